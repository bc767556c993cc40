"""What the HTML report shows of runs, as one JSON value: curves, texts, histograms, configurations, samples.

Numbers are those of metrics.jsonl to the bit. A run with more numbers than ``MAX_NUMBERS`` is thinned: of each bin of
steps a curve keeps its lowest and its highest point, and the page says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.flight import ENTROPY_EDGES, FlightRecord
from aer_megatron.algo.options import LedgerSection
from aer_megatron.report.charts import chart_sections, headline
from aer_megatron.report.flight import FLIGHT_FILE, read_flight
from aer_megatron.report.ledger_csv import LEDGER_NAME, load_ledger
from aer_megatron.report.metrics import Metric
from aer_megatron.report.page_samples import page_samples
from aer_megatron.report.writer import METRICS_FILE, MetricValue, read_metrics, read_run_manifest
from aer_megatron.types import Float64Array

MAX_NUMBERS = 100_000  # of all curves of a page, some 2 MB
MIN_POINTS = 200  # of a curve, however many there are
MAX_TEXTS = 2_000  # reasons, and alarms, of a run
MAP_COLUMNS = 120
_OF_A_SEED = ("run.seed", "run.name", "run.output_dir")  # runs that differ in nothing else are seeds of one another
_VERSION_KEYS = ("time", "command", "num_ranks", "config_digest", "git", "python", "platform", "first_step")


def page_data(run_folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the content of the page of one run, or of several laid over one another.

    Raises:
        ValueError: a folder holds no record of a step, or a damaged one.
    """
    records = [read_metrics(folder / METRICS_FILE) for folder in run_folders]
    for folder, lines in zip(run_folders, records, strict=True):
        if not lines:
            raise ValueError(f"{folder / METRICS_FILE} holds no step yet; draw after the first one")
    num_curves = sum(len(_curve_names(lines)) for lines in records)
    limit = max(MIN_POINTS, MAX_NUMBERS // max(num_curves, 1))
    runs = [_run(folder, lines, limit) for folder, lines in zip(run_folders, records, strict=True)]
    labels = [run["label"] for run in runs]
    for run, folder in zip(runs, run_folders, strict=True):
        if labels.count(run["label"]) > 1:
            run["label"] = f"{run['label']} ({folder.absolute().name})"
    groups = list(dict.fromkeys(run["alike"] for run in runs))
    for run in runs:
        run["group"] = groups.index(run.pop("alike"))
    names = {name for run in runs for name in run["curves"]}
    return {"runs": runs, "sections": chart_sections(names), "headline": headline(), "reads": _EXPLANATIONS}


_EXPLANATIONS = {
    "positions": "Mean token entropy (nats, from the bins of flight.jsonl) by a token's number in its response.",
    "ledger": "Prompts of the newest checkpoint's ledger: difficulty (1 - posterior mean) across, mean entropy up.",
}


def thinned(values: Float64Array, limit: int) -> list[int]:
    """Returns the indices of at most ``limit`` values: the lowest and the highest of each bin of neighbours."""
    if len(values) <= limit:
        return list(range(len(values)))
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(values)), max(limit // 2, 1)):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return sorted(kept)


def _run(folder: Path, records: list[dict[str, MetricValue]], limit: int) -> dict[str, Any]:
    manifest = read_run_manifest(folder)
    config = dict(_flat(manifest.get("config")))
    notes: list[str] = []
    steps = [int(record[Metric.STEP] or 0) for record in records]
    run: dict[str, Any] = {
        "label": str(manifest.get("name", folder.absolute().name)),
        "steps": steps,
        "curves": {name: _curve(steps, records, name, limit) for name in sorted(_curve_names(records))},
        "thinned": len(records) > limit,
        "reasons": _texts(records, Metric.AER_REASON),
        "alarms": _texts(records, Metric.AER_ALARM),
        "config": config,
        "facts": {key: _text(manifest[key]) for key in _VERSION_KEYS if manifest.get(key) is not None},
        "versions": {name: _text(value) for name, value in _mapping(manifest.get("versions")).items()},
        "launches": len(manifest.get("launches", [])),
        "alike": _alike(config, folder),
        "notes": notes,
    }
    for part, read in (("positions", _positions), ("ledger", _ledger), ("samples", page_samples)):
        try:
            run[part] = read(folder)
        except (ValueError, OSError) as error:  # one damaged part leaves the others
            run[part] = None
            notes.append(str(error)[:400])
    return run


def _curve_names(records: Sequence[Mapping[str, MetricValue]]) -> set[str]:
    names = {name for record in records for name, value in record.items() if isinstance(value, int | float)}
    return names - {Metric.STEP}


def _curve(steps: list[int], records: Sequence[Mapping[str, MetricValue]], name: str, limit: int) -> Any:
    """Returns one value per step, None where there is none; thinned ``{"steps", "values"}``."""
    values = [_number(record.get(name)) for record in records]
    if len(values) <= limit:
        return values
    points = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    kept = thinned(np.array([value for _, value in points], dtype=np.float64), limit)
    return {"steps": [points[index][0] for index in kept], "values": [points[index][1] for index in kept]}


def _number(value: MetricValue) -> float | None:
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _texts(records: Sequence[Mapping[str, MetricValue]], name: str) -> list[tuple[int, str]]:
    found = [(int(record[Metric.STEP] or 0), text) for record in records if isinstance(text := record.get(name), str)]
    stride = -(-len(found) // MAX_TEXTS) or 1
    return [(step, text[:400]) for step, text in found[::stride]]


def _positions(folder: Path) -> dict[str, Any] | None:
    """Returns the mean entropy by position in the response (rows) and step (columns), None without a recording."""
    records = read_flight(folder) if (folder / FLIGHT_FILE).is_file() else []
    if not records:
        return None
    edges = np.array(ENTROPY_EDGES)
    middles = (edges[:-1] + edges[1:]) / 2
    num_rows = max(len(record.profile.entropy_by_position_QK) for record in records)
    columns = np.array_split(np.arange(len(records)), min(MAP_COLUMNS, len(records)))
    values = []
    for part in columns:
        sums = np.zeros((num_rows, len(middles)))
        for index in part:
            rows = records[index].profile.entropy_by_position_QK
            sums[: len(rows)] += rows
        counts = sums.sum(1)
        values.append(
            [float(row @ middles / count) if count else None for row, count in zip(sums, counts, strict=True)]
        )
    return {
        "rows": [_position_label(row) for row in range(num_rows)],
        "columns": [_steps_label([records[part[0]], records[part[-1]]]) for part in columns],
        "values": [list(row) for row in zip(*values, strict=True)],
    }


def _position_label(row: int) -> str:
    first, last = 2**row - 1, 2 ** (row + 1) - 2
    return str(first) if first == last else f"{first}-{last}"


def _steps_label(ends: Sequence[FlightRecord]) -> str:
    first, last = ends[0].step, ends[1].step
    return str(first) if first == last else f"{first}-{last}"


def _ledger(folder: Path) -> dict[str, Any] | None:
    """Returns prompts by mean entropy (rows) and difficulty (columns) of the newest ledger, None without one."""
    paths = sorted((folder / "checkpoints").glob(f"step_*/{LEDGER_NAME}"))
    if not paths:
        return None
    ledger: DifficultyLedger = load_ledger(paths[-1])
    if not len(ledger):
        return None
    options = LedgerSection()
    prior: dict[str, Any] = {"prior_success": options.prior_success, "prior_failure": options.prior_failure}
    at: dict[str, Any] = {"step": int(ledger.export().last_step.max()), **prior}
    difficulty_edges, entropy_edges = np.linspace(0, 1, 11), np.array(ENTROPY_EDGES)
    counts = ledger.histogram2d(difficulty_edges, entropy_edges, **at)
    used = np.flatnonzero(counts.sum(0))
    rows = range(int(used[0]), int(used[-1]) + 1) if len(used) else range(0)
    levels = (0.1, 0.5, 0.9)
    return {
        "rows": [f"{entropy_edges[row]:.2g}" for row in rows],  # from this many nats on
        "columns": [f"{low:.1f}-{low + 0.1:.1f}" for low in difficulty_edges[:-1]],
        "values": [counts[:, row].tolist() for row in rows],
        "prompts": len(ledger),
        "source": paths[-1].parent.name,
        "quantiles": dict(zip(map(str, levels), ledger.quantiles(np.array(levels), **at).tolist(), strict=True)),
    }


def _alike(config: Mapping[str, Any], folder: Path) -> str:
    """Returns a text that is the same for runs that are seeds of one another."""
    if not config:
        return str(folder)
    return json.dumps({key: value for key, value in config.items() if key not in _OF_A_SEED}, sort_keys=True)


def _flat(table: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Returns the options of a configuration by their dotted names, values as JSON."""
    if isinstance(table, Mapping) and (table or not prefix):
        return [
            pair for key, value in table.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, _text(table))] if prefix else []


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:397]}..."


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
