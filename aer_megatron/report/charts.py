"""Which metrics the HTML report draws together: sections of charts, by the metrics that its runs have.

A metric that no chart names gets a chart of its own in the last section, so that nothing of metrics.jsonl is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from aer_megatron.algo.flight import BUCKETS
from aer_megatron.report.metrics import DIFFICULTY, REASON, USER, Metric, by_difficulty, of_set, pass_k, unit_of

_NOT_DRAWN = {Metric.STEP, Metric.AER_REASON, Metric.AER_ALARM, Metric.ENTROPY_INITIAL, Metric.ENTROPY_TARGET}
# section -> charts, each a title and its metrics
_SECTIONS: dict[str, tuple[tuple[str, tuple[Metric, ...]], ...]] = {
    "Reward and evaluation": (
        ("Mean reward", (Metric.REWARD_MEAN,)),
        ("Groups without a signal", (Metric.REWARD_SOLVED_ALL, Metric.REWARD_SOLVED_NONE)),
        ("Response length", (Metric.ROLLOUT_RESPONSE_LENGTH_MEAN,)),
        ("Responses cut", (Metric.ROLLOUT_TRUNCATED_SHARE,)),
    ),
    "Entropy and its control": (
        ("Token entropy H", (Metric.ENTROPY_TOKEN_MEAN,)),
        ("Coefficient", (Metric.AER_ALPHA, Metric.AER_COEFFICIENT)),
        ("Mean difficulty d", (Metric.AER_DIFFICULTY_MEAN,)),
    ),
    "By difficulty": (),
    "Update": (
        ("Loss", (Metric.LOSS_TOTAL, Metric.LOSS_POLICY, Metric.LOSS_ENTROPY_BONUS, Metric.LOSS_KL)),
        ("Supervised loss", (Metric.LOSS_SUPERVISED,)),
        ("Gradient norm", (Metric.TRAIN_GRAD_NORM,)),
        ("Tokens clipped", (Metric.TRAIN_CLIP_LOW, Metric.TRAIN_CLIP_HIGH)),
        ("KL(old || new)", (Metric.TRAIN_APPROX_KL,)),
        ("Learning rate", (Metric.TRAIN_LR,)),
    ),
    "Mismatch and staleness": (
        ("KL(rollout engine || trainer)", (Metric.ROLLOUT_MISMATCH_KL,)),
        ("Log-probability difference", (Metric.ROLLOUT_LOGPROB_DIFF_MAX, Metric.ROLLOUT_LOGPROB_DIFF_MEAN)),
        ("Effective sample size", (Metric.ROLLOUT_SAMPLE_SIZE,)),
        ("Staleness", (Metric.ROLLOUT_STALENESS_MAX, Metric.ROLLOUT_STALENESS_MEAN)),
    ),
    "Time and memory": (
        (
            "Time per phase",
            (
                Metric.TIME_STEP,
                Metric.TIME_ROLLOUT,
                Metric.TIME_TRAIN,
                Metric.TIME_SCORE,
                Metric.TIME_REWARD,
                Metric.TIME_SYNC,
                Metric.TIME_EVAL,
                Metric.TIME_CHECKPOINT,
            ),
        ),
        (
            "Throughput",
            (Metric.TIME_TOKENS_PER_S, Metric.PERF_TOKENS_PER_S_PER_GPU, Metric.PERF_ROLLOUT_TOKENS_PER_S),
        ),
        ("MFU", (Metric.PERF_MFU,)),
        ("Trainer idle", (Metric.PERF_IDLE_SHARE,)),
        ("Memory", (Metric.PERF_PEAK_MEMORY_GB, Metric.TIME_PEAK_RSS_GB)),
        ("Device memory against the plan", (Metric.PERF_PEAK_MEMORY_OF_PLAN,)),
    ),
}


def chart_sections(names: Iterable[str]) -> list[dict[str, Any]]:
    """Returns ``{"title", "charts": [{"title", "unit", "series": [...]}]}`` of the sections that have a curve.

    A series is ``{"name", "label"}``, with ``low`` and ``high`` where an interval belongs to it; a chart with
    ``lines`` has levels to draw across: ``{"name", "label"}``.
    """
    have = set(names) - _NOT_DRAWN
    sections = []
    drawn: set[str] = set()
    for title, charts in _SECTIONS.items():
        found = [_chart(name, metrics) for name, metrics in charts]
        if title == "Reward and evaluation":
            found[1:1] = _evaluation(have)
        elif title == "By difficulty":
            found = [_family(f"{measure.replace('_', ' ').capitalize()}", measure) for measure in DIFFICULTY]
        for chart in found:
            chart["series"] = [series for series in chart["series"] if series["name"] in have]
            drawn |= {series[key] for series in chart["series"] for key in ("name", "low", "high") if key in series}
        sections.append({"title": title, "charts": [chart for chart in found if chart["series"]]})
    sections.append({"title": "Other metrics", "charts": list(_others(have - drawn))})
    return [section for section in sections if section["charts"]]


def headline() -> dict[str, str]:
    """Returns the metrics that the head of the page tells, by what they are called there."""
    return {
        "reward": Metric.REWARD_MEAN,
        "entropy": Metric.ENTROPY_TOKEN_MEAN,
        "target": Metric.ENTROPY_TARGET,
        "initial": Metric.ENTROPY_INITIAL,
        "seconds": Metric.TIME_STEP,
    }


def _chart(title: str, metrics: tuple[Metric, ...]) -> dict[str, Any]:
    chart: dict[str, Any] = {
        "title": title,
        "unit": _unit(metrics[0]),
        "series": [{"name": str(metric), "label": _label(metric), "meaning": metric.meaning} for metric in metrics],
    }
    if Metric.ENTROPY_TOKEN_MEAN in metrics:
        chart["lines"] = [
            {"name": str(Metric.ENTROPY_TARGET), "label": "H*"},
            {"name": str(Metric.ENTROPY_INITIAL), "label": "H_0"},
        ]
        chart["series"][0]["label"] = "H"
    if Metric.AER_ALPHA in metrics:
        chart["reasons"] = True
    return chart


def _evaluation(have: set[str]) -> Iterator[dict[str, Any]]:
    """Yields one chart of pass@k per set."""
    places = sorted({place for name in have if (place := pass_k(name))})
    for name in dict.fromkeys(name for name, _ in places):
        series = []
        for k in (k for other, k in places if other == name):
            curve = {"name": of_set(name, "pass@K", k), "label": f"pass@{k}"}
            low, high = of_set(name, "pass@K_low", k), of_set(name, "pass@K_high", k)
            series.append(curve | ({"low": low, "high": high} if {low, high} <= have else {}))
        yield {"title": f"{name}: pass@k, 95 % interval", "set": name, "unit": "share", "series": series}


def _family(title: str, measure: str) -> dict[str, Any]:
    series = [{"name": by_difficulty(measure, bucket), "label": bucket} for bucket in BUCKETS]
    return {"title": title, "unit": DIFFICULTY[measure].unit, "series": series}


def _others(names: set[str]) -> Iterator[dict[str, Any]]:
    """Yields verdicts by reason and a user's numbers in one chart each, and every other metric in its own."""
    for title, family in (("Verdicts by reason", REASON), ("Numbers of the run's own rules", USER)):
        found = sorted(name for name in names if name.startswith(family.prefix))
        if found:
            series = [{"name": name, "label": name.removeprefix(family.prefix)} for name in found]
            yield {"title": title, "unit": family.unit, "series": series}
            names = names - set(found)
    for name in sorted(names):
        yield {"title": name, "unit": _unit(name), "series": [{"name": name, "label": _label(name)}]}


def _label(name: str) -> str:
    return name.rsplit("/", 1)[-1].removesuffix("_s").replace("_", " ")


def _unit(name: str) -> str:
    try:
        return unit_of(name)
    except ValueError:  # of another version
        return ""
