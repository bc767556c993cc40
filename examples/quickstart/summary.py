"""Prints what came out of a run: its report, and pass@k and entropy before and after training.

python examples/quickstart/summary.py RUN.toml [--section.key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from aer_megatron.config_loading import load_config
from aer_megatron.report.metrics import Metric, of_set, pass_at, pass_k
from aer_megatron.report.writer import METRICS_FILE, MetricValue, read_metrics

_REPORTS = ("report.html", "report.png", METRICS_FILE)  # the first that is there
_LAST_STEPS = 10


def summary(records: Sequence[Mapping[str, MetricValue]]) -> list[str]:
    """Returns three lines on a run: pass@k of its first evaluation set before and after training, and its entropy."""
    sets = {place for record in records for name in record if (place := pass_k(name))}
    name = min((name for name, _ in sets), default="")
    evaluated = [record for record in records if any(pass_at(*place) in record for place in sets if place[0] == name)]
    lines = [f"no evaluation of {label}" for label in ("the base", "the final policy")]
    if evaluated:
        ks = sorted(k for found, k in sets if found == name)
        lines = [
            _passes(label, record, name, ks) for label, record in (("base ", evaluated[0]), ("final", evaluated[-1]))
        ]
    return [*lines, _entropy([record for record in records if Metric.ENTROPY_TOKEN_MEAN in record][-_LAST_STEPS:])]


def _passes(label: str, record: Mapping[str, MetricValue], name: str, ks: Sequence[int]) -> str:
    cells = [
        f"pass@{k} {_number(record, pass_at(name, k))} ({_number(record, of_set(name, 'pass@K_low', k))}-"
        f"{_number(record, of_set(name, 'pass@K_high', k))})"
        for k in ks
    ]
    return f"{label}  {name}: {'  '.join(cells)}"


def _entropy(records: Sequence[Mapping[str, MetricValue]]) -> str:
    if not records:
        return "entropy not recorded"
    last = records[-1]
    values = [float(value) for record in records if isinstance(value := record[Metric.ENTROPY_TOKEN_MEAN], int | float)]
    mean, target, initial = (
        sum(values) / max(len(values), 1),
        *(_number(last, each) for each in (Metric.ENTROPY_TARGET, Metric.ENTROPY_INITIAL)),
    )
    return f"H / H*  {mean:.3f} / {target} nats, mean of the last {len(values)} steps (H_0 {initial})"


def _number(record: Mapping[str, MetricValue], name: str) -> str:
    value = record.get(name)
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    run_file, *overrides = arguments
    folder = Path(load_config(run_file, overrides).run.output_dir)
    report = next(folder / name for name in _REPORTS if (folder / name).is_file())
    for line in (f"report  {report}", *summary(read_metrics(folder / METRICS_FILE))):
        print(f"quickstart: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
