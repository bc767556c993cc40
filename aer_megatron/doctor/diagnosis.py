"""Rows of the doctor's table, and the causes that failed rows point to: pure functions of what was measured.

    checks + clues --diagnose--> causes, each with its remedy and with the failed rows that it accounts for

A cause is derived from WHICH rows fail and which hold, never from a single number. Causes further up the chain come
first (file -> model -> gradient -> weight transfer -> rollout), and a row that one of them accounts for is not blamed
on another: a tensor that was loaded wrongly makes every later comparison fail.

This file does NOT measure anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Area = Literal["round trip", "transformers", "layouts", "repeat", "weight sync", "rollout"]
Status = Literal["pass", "fail", "skipped"]
FindingKind = Literal["exchanged", "stale", "changed", "missing", "unknown", "refused"]
ExplanationKind = Literal["temperature", "rope base", "rope scaling", "exchange"]

TRAINING, ROLLOUT = "training", "rollout"  # whose log-probabilities a row is about
GRADIENT_MEASURES = ("gradient norm", "step")


@dataclass(frozen=True, slots=True)
class Check:
    """One row. Example: ``Check("layouts", "gradient norm", "pp 2", "pass", 1.204, 1.204, 1e-5)``."""

    area: Area
    measure: str
    subject: str  # what was measured: a layout, ``training`` or ``rollout``, a policy version
    status: Status
    value: float | None = None
    reference: float | None = None
    tolerance: float | None = None
    relative: bool = True  # whether the tolerance is a fraction of the reference
    note: str = ""


@dataclass(frozen=True, slots=True)
class TensorFinding:
    """A tensor that is not what it should be.

    ``other`` is the tensor whose values it holds, the policy version that it is still of, or a message.
    Example: ``TensorFinding("weight sync", "model.norm.weight", "stale", "0", version=1)``.
    """

    area: Area
    name: str
    kind: FindingKind
    other: str = ""
    version: int = 0  # the policy version that was published


@dataclass(frozen=True, slots=True)
class Explanation:
    """The one change under which transformers reproduces numbers that it otherwise contradicts, in mean nats."""

    kind: ExplanationKind
    change: str  # "temperature 0.6 instead of 1"
    error_before: float
    error_after: float


@dataclass(frozen=True, slots=True)
class PositionProfile:
    """Mean |log-probability error| (nats) of tokens that see one position, and of those that see more."""

    first: float
    later: float

    @property
    def depends_on_position(self) -> bool:
        return self.later > 0 and self.first < 0.01 * self.later


@dataclass(frozen=True, slots=True)
class Clues:
    """What was measured beside the rows; keys of ``axes`` and ``moved`` are layouts, of the others whose numbers."""

    own: str = ""  # the run's layout, which is held against transformers and the engine
    axes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    moved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensors whose step differs, worst first
    tensors: tuple[TensorFinding, ...] = ()
    explanations: Mapping[str, Explanation] = field(default_factory=dict)
    profiles: Mapping[str, PositionProfile] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A named cause. ``accounts_for`` are the failed rows that it is blamed for."""

    cause: str
    remedy: str
    accounts_for: tuple[Check, ...]


def compared(
    area: Area, measure: str, subject: str, value: float, reference: float, *, tolerance: float, relative: bool = True
) -> Check:
    """Returns the row of a number that must lie within ``tolerance`` of ``reference``; a NaN fails."""
    limit = tolerance * abs(reference) if relative else tolerance
    status: Status = "pass" if abs(value - reference) <= limit else "fail"
    return Check(area, measure, subject, status, value, reference, tolerance, relative)


def bounded(area: Area, measure: str, subject: str, value: float, *, bound: float, note: str = "") -> Check:
    """Returns the row of a difference that must not exceed ``bound``; a NaN fails."""
    return Check(area, measure, subject, "pass" if value <= bound else "fail", value, 0.0, bound, False, note)


def skipped(area: Area, measure: str, subject: str, reason: str) -> Check:
    """Returns a row that says why nothing was measured."""
    return Check(area, measure, subject, "skipped", note=reason)


def compare_tensors(
    area: Area,
    expected: Mapping[str, int],
    held: Mapping[str, int],
    *,
    version: int = 0,
    earlier: Mapping[int, Mapping[str, int]] | None = None,
) -> tuple[TensorFinding, ...]:
    """Returns every tensor whose checksum is not the expected one, with where its content comes from.

    Args:
        expected, held: checksum by tensor name.
        version: the policy version of ``expected``.
        earlier: the checksums of older versions, to recognise a tensor that was left behind.
    """
    owners = {value: name for name, value in expected.items()}
    found = [TensorFinding(area, name, "unknown", version=version) for name in held if name not in expected]
    for name, value in expected.items():
        if name not in held:
            found.append(TensorFinding(area, name, "missing", version=version))
        elif held[name] != value:
            old = [number for number, table in (earlier or {}).items() if table.get(name) == held[name]]
            owner = owners.get(held[name])
            if old:
                found.append(TensorFinding(area, name, "stale", str(max(old)), version))
            elif owner is not None:
                found.append(TensorFinding(area, name, "exchanged", owner, version))
            else:
                found.append(TensorFinding(area, name, "changed", version=version))
    return tuple(found)


def fit_temperature(error: Callable[[float], float]) -> tuple[float, float]:
    """Returns (temperature, error) at the minimum of ``error`` over 0.05..20: a grid, then golden-section search."""
    grid = [math.log(0.05) + i * (math.log(20.0) - math.log(0.05)) / 40 for i in range(41)]
    errors = [error(math.exp(x)) for x in grid]
    best = min(range(len(grid)), key=errors.__getitem__)
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-7:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if error(math.exp(left)) <= error(math.exp(right)):
            high = right
        else:
            low = left
    temperature = math.exp((low + high) / 2.0)
    return temperature, error(temperature)


def diagnose(checks: Sequence[Check], clues: Clues) -> list[Diagnosis]:
    """Returns the causes of the failed rows, upstream first; every failed row belongs to exactly one."""
    left = [check for check in checks if check.status == "fail"]
    found: list[Diagnosis] = []

    def blame(cause: str, remedy: str, accounts_for: Callable[[Check], bool]) -> None:
        taken = tuple(check for check in left if accounts_for(check))
        if taken:
            left[:] = [check for check in left if check not in taken]
            found.append(Diagnosis(cause, remedy, taken))

    _blame_round_trip(blame, clues)
    _blame_layouts(blame, checks, clues)
    _blame_training(blame, clues)
    _blame_weight_sync(blame, clues)
    _blame_rollout(blame, clues)
    blame(
        "the same run twice gives different numbers: an operation is not deterministic",
        "set megatron.deterministic_mode = true, and on GPUs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 and "
        "CUBLAS_WORKSPACE_CONFIG=:4096:8; without them runs cannot be repeated bit for bit",
        lambda check: check.area == "repeat",
    )
    return found


_Blame = Callable[[str, str, Callable[[Check], bool]], None]


def _blame_round_trip(blame: _Blame, clues: Clues) -> None:
    findings = [finding for finding in clues.tensors if finding.area == "round trip"]
    if findings:
        blame(
            f"Hugging Face -> Megatron -> Hugging Face does not give the file back: {_describe(findings)}",
            "correct the tensor's row in convert/families.py (names, layouts) or the loader in actor/weights.py",
            # everything that compares the loaded policy with the file is wrong in consequence
            lambda check: check.area in ("round trip", "transformers"),
        )
    blame(
        "the checkpoint could not be carried through the policy",
        "the row's note is the loader's own message",
        lambda check: check.area == "round trip",
    )


def _blame_training(blame: _Blame, clues: Clues) -> None:
    explanation = clues.explanations.get(TRAINING)
    profile = clues.profiles.get(TRAINING)

    def gradient_only(check: Check) -> bool:
        return _is_of_training(check) and check.measure in GRADIENT_MEASURES

    if explanation is not None:
        blame(
            f"training computes with {explanation.change}: {_proof(explanation)}",
            _REMEDIES[explanation.kind].format(side="training"),
            lambda check: _is_of_training(check) or (check.area == "rollout" and ROLLOUT not in clues.explanations),
        )
    elif profile is not None and profile.depends_on_position:
        blame(
            "training agrees with transformers on tokens that see one position and not on later ones: rope base or "
            "scaling (none of the common bases fits), or attention mask",
            "compare rope_theta and rope_scaling of config.json with what reaches Megatron's GPTModel (rotary_base, "
            "rope_scaling_factor); then the attention mask",
            _is_of_training,
        )
    elif profile is not None:
        blame(
            f"training differs from transformers by {profile.first:.3g} nats already on tokens that see one position: "
            "weights, norms, activation or head",
            "round trip and layouts hold, so the loader and its inverse share an error, or a constant of the model "
            "(norm_eps, activation, tied head) is wrong: compare layer by layer",
            lambda check: _is_of_training(check) and not gradient_only(check),
        )
    blame(
        "log-probabilities agree with transformers and the gradient norm does not, in any layout: gradients are "
        "scaled, or a part of them is missing everywhere",
        "look at the loss's normaliser, Megatron's gradient scaling (calculate_per_token_loss, finalize_model_grads) "
        "and detached parts of the graph",
        gradient_only,
    )
    blame(
        "training and transformers disagree in a way that no known cause explains",
        "the rows say by how much; add --model.dtype=fp32 to take rounding out of the comparison",
        _is_of_training,
    )


_REMEDIES: Mapping[ExplanationKind, str] = {
    "temperature": "make {side} divide the logits by rollout.temperature: it must be the same number on both sides",
    "rope base": "make {side} read rope_theta from the model's config.json (an engine may need its own option)",
    "rope scaling": "make {side} honour rope_scaling of the model's config.json",
    "exchange": "the two tensors are exchanged in {side} on the way in and back on the way out, so that the round trip "
    "hides it: correct their row in convert/families.py, or the engine's loader",
}


def _is_of_training(check: Check) -> bool:
    return check.area == "transformers" and check.subject != ROLLOUT


def _blame_layouts(blame: _Blame, checks: Sequence[Check], clues: Clues) -> None:
    rows = [check for check in checks if check.area == "layouts" and check.status != "skipped"]
    failed = [check for check in rows if check.status == "fail"]
    wrong_scores = {check.subject for check in failed if check.measure not in GRADIENT_MEASURES}
    wrong = {check.subject for check in failed}
    right = {check.subject for check in rows} - wrong
    if wrong_scores:
        where = _common_axes(wrong_scores, right, clues.axes)
        blame(
            f"the forward pass depends on the layout: {where} changes log-probabilities",
            "look at what that axis exchanges in the forward pass (a missing or doubled all-reduce, padded vocabulary "
            "rows, positions of a rank's part of the sequence)",
            lambda check: check.area == "layouts" or (clues.own in wrong and _is_of_training(check)),
        )
    elif wrong:
        axes = _separating_axes(wrong, right, clues.axes)
        tensors = sorted({name for subject in wrong for name in clues.moved.get(subject, ())[:1]})
        worst = f"; furthest off: {', '.join(tensors[:3])}" if tensors else ""
        if axes == {"micro-batches"}:
            blame(
                f"the gradient depends on the number of micro-batches (a mean of means, or one is dropped){worst}",
                "the loss must carry the global token count: nothing may divide by the number of micro-batches",
                lambda check: check.measure in GRADIENT_MEASURES,
            )
            return
        blame(
            f"a gradient reduction is dropped or doubled: {_common_axes(wrong, right, clues.axes)} changes the "
            f"gradient while loss and entropy hold in every layout{worst}",
            "look at finalize_model_grads (actor/actor.py) and Megatron's DDP: data parallelism adds gradients in "
            "finish_grad_sync, sequence parallelism those of norms, pipelines those of tied embeddings",
            lambda check: check.measure in GRADIENT_MEASURES,
        )


def _blame_weight_sync(blame: _Blame, clues: Clues) -> None:
    findings = [finding for finding in clues.tensors if finding.area == "weight sync"]
    refusals = [finding for finding in findings if finding.kind == "refused"]
    if refusals:
        blame(
            f"the rollout engine refuses the weights: {_describe(refusals)}",
            "the message is the transport's own; what the embedded engine cannot hold, SGLang servers may",
            lambda check: check.area in ("weight sync", "rollout") or check.subject == ROLLOUT,
        )
    elif findings:
        blame(
            f"the rollout engine does not hold the published weights: {_describe(findings)}",
            "stale: the transfer skipped the tensor or the engine kept a copy of it; exchanged: its loader's name "
            "table is wrong; do not train before every checksum agrees",
            lambda check: check.area in ("weight sync", "rollout") or check.subject == ROLLOUT,
        )


def _blame_rollout(blame: _Blame, clues: Clues) -> None:
    def of_rollout(check: Check) -> bool:
        return check.area == "rollout" or check.subject == ROLLOUT

    explanation = clues.explanations.get(ROLLOUT)
    if explanation is not None:
        blame(
            f"the rollout engine samples with {explanation.change}: {_proof(explanation)}",
            _REMEDIES[explanation.kind].format(side="the rollout engine"),
            of_rollout,
        )
    profile = clues.profiles.get(ROLLOUT)
    if profile is not None and profile.depends_on_position:
        blame(
            "rollout and training agree on the first position and not on later ones: rope or attention of the engine",
            "compare the engine's rope_theta, rope_scaling and attention backend with config.json",
            of_rollout,
        )
    blame(
        "rollout and training do not hold the same policy, although every checksum agrees",
        "compare temperature, dtype, rope and attention of the engine with the trainer's; --reference=always says "
        "which of the two is wrong",
        lambda check: check.area in ("weight sync", "rollout") or check.subject == ROLLOUT,
    )


def _proof(explanation: Explanation) -> str:
    return (
        f"under it transformers reproduces the log-probabilities to {explanation.error_after:.2g} nats, "
        f"without it to {explanation.error_before:.2g}"
    )


def _describe(findings: Sequence[TensorFinding]) -> str:
    """Returns the findings in words: exchanged pairs once, the rest counted after the first three."""
    lines: list[str] = []
    exchanged = {finding.name: finding.other for finding in findings if finding.kind == "exchanged"}
    for finding in findings:
        name, other = finding.name, finding.other
        if finding.kind == "exchanged" and exchanged.get(other) == name:
            if name < other:
                lines.append(f"{name} and {other} are exchanged")
        else:
            lines.append(_WORDS[finding.kind].format(name=name, other=other, version=finding.version))
    lines = list(dict.fromkeys(lines))
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


_WORDS: Mapping[FindingKind, str] = {
    "exchanged": "{name} holds the values of {other}",
    "stale": "{name} is still that of policy version {other}, version {version} was published",
    "changed": "{name} holds other bits",
    "missing": "{name} is missing",
    "unknown": "{name} was never sent",
    "refused": "{other}",
}


def _separating_axes(wrong: set[str], right: set[str], axes: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """Returns the axes that every wrong layout has and no right one."""
    common = frozenset.intersection(*(axes.get(subject, frozenset()) for subject in wrong))
    return common - frozenset().union(*(axes.get(subject, frozenset()) for subject in right))


def _common_axes(wrong: set[str], right: set[str], axes: Mapping[str, frozenset[str]]) -> str:
    """Returns the parallel axes in words by which wrong layouts differ from right ones, or the layouts themselves."""
    separating = _separating_axes(wrong, right, axes)
    return " and ".join(sorted(separating)) if separating else f"one of the layouts {', '.join(sorted(wrong))}"
