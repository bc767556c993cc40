"""Which causes the doctor derives from which failed rows: hand-made rows and clues, no model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from aer_megatron.doctor.diagnosis import (
    ROLLOUT,
    TRAINING,
    Area,
    Check,
    Clues,
    Explanation,
    PositionProfile,
    TensorFinding,
    bounded,
    compare_tensors,
    compared,
    diagnose,
    fit_temperature,
)

AXES = {
    "own": frozenset({"data parallelism"}),
    "dp 2 micro": frozenset({"data parallelism", "micro-batches"}),
    "one micro": frozenset({"micro-batches"}),
    "tp 2": frozenset({"tensor parallelism"}),
    "tp 2 sp": frozenset({"tensor parallelism", "sequence parallelism"}),
}


def layout_rows(measure: str, wrong: set[str]) -> list[Check]:
    return [Check("layouts", measure, name, "fail" if name in wrong else "pass") for name in AXES]


def failed(area: Area, measure: str, subject: str) -> Check:
    return Check(area, measure, subject, "fail")


def only_cause(checks: list[Check], **clues: Any) -> str:
    """Returns the cause of all failed rows; there must be one."""
    (cause,) = diagnose(checks, Clues(axes=AXES, **clues))
    assert set(cause.accounts_for) == {check for check in checks if check.status == "fail"}
    assert cause.remedy
    return cause.cause


def test_rows_within_their_tolerance_have_no_cause() -> None:
    rows = [compared("layouts", "loss", "tp 2", 1.0 + 9e-6, 1.0, tolerance=1e-5), *layout_rows("loss", set())]
    assert {row.status for row in rows} == {"pass"}
    assert diagnose(rows, Clues(axes=AXES)) == []


@pytest.mark.parametrize("value", [1.0 + 2e-5, 1.0 - 2e-5, math.nan, math.inf])
def test_a_number_beyond_its_tolerance_fails(value: float) -> None:
    assert compared("layouts", "loss", "tp 2", value, 1.0, tolerance=1e-5).status == "fail"


def test_a_relative_tolerance_scales_with_the_reference() -> None:
    assert compared("layouts", "loss", "x", -200.001, -200.0, tolerance=1e-5).status == "pass"
    assert compared("layouts", "loss", "x", -200.001, -200.0, tolerance=1e-5, relative=False).status == "fail"


@pytest.mark.parametrize("value", [1.1, math.nan])
def test_a_difference_beyond_its_bound_fails(value: float) -> None:
    assert bounded("rollout", "max", "x", value, bound=1.0).status == "fail"


def test_a_gradient_that_only_data_parallel_layouts_get_wrong_is_a_dropped_reduction() -> None:
    rows = layout_rows("loss", set()) + layout_rows("gradient norm", {"own", "dp 2 micro"})
    cause = only_cause(rows, moved={"own": ("model.norm.weight",)})
    assert "gradient reduction is dropped" in cause and ": data parallelism changes" in cause
    assert "model.norm.weight" in cause


def test_sequence_parallelism_is_told_from_tensor_parallelism() -> None:
    cause = only_cause(layout_rows("loss", set()) + layout_rows("step", {"tp 2 sp"}))
    assert ": sequence parallelism changes" in cause


def test_a_gradient_that_depends_on_the_number_of_micro_batches_is_a_mean_of_means() -> None:
    cause = only_cause(layout_rows("gradient norm", {"dp 2 micro", "one micro"}))
    assert "number of micro-batches" in cause


def test_wrong_scores_of_some_layouts_are_a_forward_fault() -> None:
    rows = layout_rows("log-probability, max", {"tp 2", "tp 2 sp"}) + layout_rows("gradient norm", {"tp 2", "tp 2 sp"})
    assert "forward pass depends on the layout: tensor parallelism" in only_cause(rows)


def test_what_the_run_s_own_layout_gets_wrong_is_not_blamed_on_the_model() -> None:
    rows = [*layout_rows("loss", {"own", "dp 2 micro"}), failed("transformers", "token entropy", TRAINING)]
    cause = only_cause(rows, own="own", profiles={TRAINING: PositionProfile(0.0, 0.3)})
    assert "forward pass depends on the layout: data parallelism" in cause


def test_layouts_without_a_common_axis_are_listed() -> None:
    cause = only_cause(layout_rows("gradient norm", {"own", "tp 2"}))
    assert "one of the layouts own, tp 2" in cause


def test_the_same_error_in_every_layout_from_the_second_position_on_is_the_rope() -> None:
    rows = [*layout_rows("loss", set()), failed("transformers", "token entropy", TRAINING)]
    cause = only_cause(rows, profiles={TRAINING: PositionProfile(first=1e-7, later=0.3)})
    assert "rope base or scaling" in cause


def test_an_error_on_the_first_position_too_is_not_the_rope() -> None:
    rows = [failed("transformers", "token entropy", TRAINING)]
    cause = only_cause(rows, profiles={TRAINING: PositionProfile(first=0.2, later=0.3)})
    assert "weights, norms, activation or head" in cause


def test_an_explanation_names_the_cause_and_its_proof() -> None:
    rows = [failed("transformers", "token entropy", TRAINING), failed("rollout", "log-probability, max", "version 0")]
    found = Explanation("temperature", "temperature 0.7 instead of 1", 0.4, 2e-7)
    cause = only_cause(rows, explanations={TRAINING: found}, profiles={TRAINING: PositionProfile(0.2, 0.3)})
    assert "training computes with temperature 0.7 instead of 1" in cause and "2e-07" in cause


def test_a_rollout_fault_is_not_blamed_on_training() -> None:
    rows = [
        failed("transformers", "log-probability, mean", ROLLOUT),
        failed("rollout", "log-probability, max", "version 0"),
    ]
    found = Explanation("rope base", "rope base 10000 instead of 1e+06", 0.4, 2e-7)
    cause = only_cause(rows, explanations={ROLLOUT: found}, profiles={TRAINING: PositionProfile(0.0, 0.0)})
    assert cause.startswith("the rollout engine samples with rope base 10000")


def test_rollouts_that_differ_without_a_clue_still_get_a_cause() -> None:
    cause = only_cause([failed("rollout", "log-probability, mean", "version 0")])
    assert "do not hold the same policy" in cause


def test_a_wrong_gradient_in_every_layout_is_a_scale() -> None:
    cause = only_cause([*layout_rows("loss", set()), failed("transformers", "gradient norm", TRAINING)])
    assert "gradients are scaled" in cause


def test_an_exchanged_tensor_accounts_for_what_follows_from_it() -> None:
    rows = [failed("round trip", "tensors", "own"), failed("transformers", "token entropy", TRAINING)]
    findings = compare_tensors("round trip", {"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 1, "c": 3})
    cause = only_cause(rows, tensors=findings, profiles={TRAINING: PositionProfile(0.2, 0.3)})
    assert cause.endswith(": a and b are exchanged")


def test_a_stale_tensor_is_named_with_its_version() -> None:
    rows = [failed("weight sync", "checksums", "version 4"), failed("rollout", "log-probability, max", "version 4")]
    findings = compare_tensors(
        "weight sync", {"a": 11, "b": 12}, {"a": 11, "b": 2}, version=4, earlier={2: {"a": 1, "b": 9}, 3: {"b": 2}}
    )
    assert findings == (TensorFinding("weight sync", "b", "stale", "3", 4),)
    assert "b is still that of policy version 3, version 4 was published" in only_cause(rows, tensors=findings)


def test_a_refusal_is_told_once_in_the_transport_s_words() -> None:
    rows = [failed("weight sync", "checksums", "version 0"), failed("weight sync", "checksums", "version 1")]
    findings = tuple(TensorFinding("weight sync", "", "refused", "no such parameter", version) for version in (0, 1))
    assert only_cause(rows, tensors=findings) == "the rollout engine refuses the weights: no such parameter"


def test_tensors_that_are_missing_unknown_or_altered_are_told_apart() -> None:
    findings = compare_tensors("weight sync", {"a": 1, "b": 2, "c": 3}, {"a": 7, "b": 3, "d": 4})
    assert {(finding.name, finding.kind, finding.other) for finding in findings} == {
        ("a", "changed", ""),
        ("b", "exchanged", "c"),
        ("c", "missing", ""),
        ("d", "unknown", ""),
    }


def test_a_repeat_that_differs_is_its_own_cause_beside_another() -> None:
    rows = [failed("repeat", "bits", "own"), *layout_rows("gradient norm", {"tp 2", "tp 2 sp"})]
    causes = [cause.cause for cause in diagnose(rows, Clues(axes=AXES))]
    assert len(causes) == 2
    assert any("not deterministic" in cause for cause in causes)
    assert any("tensor parallelism" in cause for cause in causes)


@pytest.mark.parametrize("temperature", [0.06, 0.7, 1.0, 3.5])
def test_the_temperature_of_log_probabilities_is_found(temperature: float) -> None:
    logits = [2.0, 0.5, -1.0, 0.0]

    def logprob(t: float) -> float:
        return logits[1] / t - math.log(sum(math.exp(x / t) for x in logits))

    fitted, error = fit_temperature(lambda t: abs(logprob(t) - logprob(temperature)))
    assert fitted == pytest.approx(temperature, rel=1e-5)
    assert error < 1e-4
