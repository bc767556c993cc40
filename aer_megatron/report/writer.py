"""metrics.jsonl and run.json: the record of a run that survives it.

One line of metrics.jsonl is one JSON object: ``step`` first, ``perf/*`` and ``time/*`` last, names in alphabetical
order between. Floats are written in full (``repr``), so reading gives back the same bits. NaN and infinities are
written as null, because JSON has no word for them.

This file does NOT compute metrics; names come from metrics.py.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from aer_megatron.config import Config
from aer_megatron.config_loading import config_digest
from aer_megatron.files.json_input import kind_of, parse_json
from aer_megatron.files.whole_files import LineFile, replace_file
from aer_megatron.report.masking import mask_arguments, mask_table
from aer_megatron.report.metrics import MACHINE_PREFIXES, Metric, unit_of

METRICS_FILE = "metrics.jsonl"
MANIFEST_FILE = "run.json"

_LOG = logging.getLogger(__name__)
_OWNER_ONLY = 0o600

MetricValue = float | str | bool | None


class MetricsWriter:
    """Appends one line per step to ``folder``/metrics.jsonl; the folder is made if it is missing.

    Lines of an earlier launch stay; call ``truncate_from(resume_step)`` before the first ``write``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = LineFile(self.path)
        self._last_step = -1
        for step, _ in split_lines(self.path):
            self._last_step = step

    @property
    def last_step(self) -> int:
        """Returns the step of the last whole line, -1 where there is none."""
        return self._last_step

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Appends one step and hands it to the operating system before it returns; on a full disk see ``LineFile``.

        Raises:
            ValueError: ``step`` is missing or not beyond the last line's, a name is unknown, or a value has
                no place in the file.
        """
        record = normalize(metrics)
        step = record[Metric.STEP]
        if not isinstance(step, int) or step <= self._last_step:
            raise ValueError(
                f"{Metric.STEP}={step} must be an integer above {self._last_step}, the last step in "
                f"{self.path}; truncate the file at the resume step first"
            )
        self._lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False))
        self._last_step = step

    def close(self) -> None:
        """Writes the lines for which there was no room; raises RuntimeError where there is none yet."""
        self._lines.close()

    def truncate_from(self, resume_step: int) -> None:
        """Drops the lines of ``resume_step`` and later, and a half-written last line, in one atomic rename.

        Raises:
            ValueError: a line before the last one is not a JSON object with a step.
        """
        kept = [(step, line) for step, line in split_lines(self.path) if step < resume_step]
        self._last_step = kept[-1][0] if kept else -1
        missing = sorted(set(range(resume_step)) - {step for step, _ in kept})
        if missing:  # a killed run takes the lines with it for which there was no room
            _LOG.warning("%s has no line of %d step(s) before step %d, the first of them %d: they are lost",
                         self.path, len(missing), resume_step, missing[0])  # fmt: skip
        if self.path.exists():
            replace_file(self.path, "".join(f"{line}\n" for _, line in kept))


def normalize(metrics: Mapping[str, Any]) -> dict[str, MetricValue]:
    """Returns the metrics in file order with plain Python values; what is not finite becomes None.

    Raises:
        ValueError: ``step`` is missing, a name is unknown, or a value does not fit the metric's unit.
    """
    if Metric.STEP not in metrics:
        raise ValueError(f"metrics without {str(Metric.STEP)!r} cannot be recorded; add it")
    names = sorted((str(name) for name in metrics), key=_file_order)
    return {name: _plain(name, metrics[name]) for name in names}


def read_metrics(path: str | Path) -> list[dict[str, MetricValue]]:
    """Returns the records of a metrics.jsonl in file order; a half-written last line is left out.

    Raises:
        ValueError: the file is missing, or a line before the last one is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run that has made a step")
    records = [json.loads(line) for _, line in split_lines(path)]
    for record in records:
        for name, value in record.items():
            if isinstance(value, dict | list):
                raise ValueError(
                    f"{path}, step {record[Metric.STEP]}: {name[:80]} must be a number or a text, it is "
                    f"{kind_of(value)}; repair or remove the line"
                )
    return records


def package_versions(names: Sequence[str]) -> dict[str, str | None]:
    """Returns the installed version of each distribution, None where it is not installed."""
    return {name: _version(name) for name in names}


def write_run_manifest(
    folder: str | Path,
    config: Config,
    versions: Mapping[str, str | None],
    *,
    command: Sequence[str],
    num_ranks: int,
    first_step: int = 0,
) -> Path:
    """Returns the path of run.json: the resolved configuration and what it takes to repeat the run.

    ``launches`` in it lists every launch of the run, this one last; beside it stand the same keys of the newest launch
    that made a step, which is this one at once where it begins the run and after ``mark_trained`` where it goes on.
    ``command`` is the module and its arguments, ``("aer_megatron.train", "run.toml")``: ``sys.argv[0]``
    would be a path of this machine. Secrets are masked, and the file is the owner's alone (0600).

    Raises:
        ValueError: the folder's run.json is damaged.
    """
    resolved = recorded_config(config)
    launch = {
        "name": config.run.name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "first_step": first_step,
        "command": mask_arguments(command),
        "num_ranks": num_ranks,
        "config_digest": config_digest(resolved),
        "git": source_commit(Path(__file__)),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": dict(versions),
        "config": resolved,
    }
    trained = read_run_manifest(folder)
    launches = trained.pop("launches", [trained] if trained else [])
    if first_step == 0 or not trained:
        trained = launch
    path = Path(folder) / MANIFEST_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace_manifest(path, {**trained, "launches": [*launches, launch]})
    return path


def mark_trained(folder: str | Path) -> None:
    """Makes the newest launch in run.json the one that its top-level keys describe; nothing where there is none."""
    launches = read_run_manifest(folder).get("launches")
    if launches:
        _replace_manifest(Path(folder) / MANIFEST_FILE, {**launches[-1], "launches": launches})


def read_run_manifest(folder: str | Path) -> dict[str, Any]:
    """Returns the content of ``folder``/run.json, an empty mapping where there is none.

    Raises:
        ValueError: it is not a JSON object, or its launches are not a list of objects.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); repair it or move it away") from None
    launches = content.get("launches", []) if isinstance(content, dict) else None
    if not isinstance(launches, list) or not all(isinstance(launch, dict) for launch in launches):
        raise ValueError(f"{path} is not the record of a run; repair it or move it away")
    return dict(content)


def recorded_config(config: Config) -> dict[str, Any]:
    """Returns the resolved configuration as run.json records it: without secrets."""
    return mask_table(config.model_dump(mode="json"))


def changed_options(folder: str | Path, config: Config) -> list[str]:
    """Returns ``optimizer.lr 0.0001 -> 5e-05`` for every option that differs from that of the run in ``folder``.

    Compared is what run.json records, so a secret never shows. An empty list also where there is no run.json.
    """
    before = read_run_manifest(folder).get("config")
    if not isinstance(before, dict):
        return []
    old, new = dict(flat_options(mask_table(before))), dict(flat_options(recorded_config(config)))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"{name} {_short(old, name)} -> {_short(new, name)}" for name in names]


def flat_options(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of nested tables."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat_options(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(table: Mapping[str, Any], name: str) -> str:
    text = json.dumps(table[name], ensure_ascii=False) if name in table else "unset"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _replace_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    content = mask_table(manifest)  # also what launches of before there was a mask left in it
    replace_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", mode=_OWNER_ONLY)


def source_commit(file: Path) -> dict[str, Any] | None:
    """Returns ``{"commit", "modified"}`` of the git repository that tracks ``file``, None where none does.

    An installed package may lie inside an unrelated repository (a virtual environment in a project folder),
    so being below a repository is not enough: git must track the file.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": bool(changes)}


def _file_order(name: str) -> tuple[int, str]:
    if name == Metric.STEP:
        return 0, name
    return (2 if name.startswith(MACHINE_PREFIXES) else 1), name


def _plain(name: str, value: Any) -> MetricValue:
    unit = unit_of(name)
    if value is None:
        return None
    if unit == "text":
        if isinstance(value, str):
            return value
    elif unit == "flag":
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
    elif isinstance(value, Integral):
        return int(value)
    elif isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    raise ValueError(f"metric {name}={value!r} of type {type(value).__name__} does not fit its unit {unit!r}")


def split_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (step, line without its end) of every whole line."""
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if number == len(lines) and not raw:
            return
        try:
            line = raw.decode("utf-8")
            step = _step_of(line)
        except ValueError as error:
            if number == len(lines):
                return  # a process killed while it wrote leaves part of a line and no line end
            raise ValueError(
                f"{path}, line {number} is not the record of a step ({error}); repair or remove it"
            ) from None
        yield step, line


def _step_of(line: str) -> int:
    record = parse_json(line)
    step = record.get(Metric.STEP) if isinstance(record, dict) else None
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"its {Metric.STEP} must be an integer of at least 0")
    return step


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
