"""The doctor's batch, sketches and the choice of the layout that others are compared with."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from aer_megatron.doctor.diagnosis import Check
from aer_megatron.doctor.layout_comparison import (
    TOLERANCES,
    Measurement,
    Truth,
    choose_anchor,
    compare_layouts,
    compare_with_truth,
    position_profile,
    positions,
    probe_batch,
    probe_experience,
    tensor_sketch,
)
from aer_megatron.doctor.table import table_text, verdict_text

LOGPROB_T = np.linspace(-2.0, -1.0, 5, dtype=np.float32)


def measurement(name: str, **changes: object) -> Measurement:
    item = Measurement(
        name=name,
        axes=frozenset(),
        logprob_T=LOGPROB_T,
        token_entropy_T=LOGPROB_T,
        loss=-1.0,
        token_entropy=0.8,
        grad_norm=3.0,
        step_C={"a": np.ones(4), "b": np.full(4, 2.0)},
    )
    return dataclasses.replace(item, **changes)  # type: ignore[arg-type]


def test_the_batch_is_ragged_and_has_prompts_of_one_token() -> None:
    experience = probe_experience(num_sequences=8, vocab_size=11, longest=40, seed=3)
    lengths = experience.prompt_length_B + experience.response_length_B
    assert experience.num_sequences == 8
    assert lengths.max() == lengths[0] == 40
    assert len(set(lengths.tolist())) > 3
    assert (experience.prompt_length_B == 1).sum() >= 4
    assert experience.token_ids_L.min() >= 0 and experience.token_ids_L.max() < 11
    positions_T = positions(experience)
    assert (positions_T == 0).sum() == (experience.prompt_length_B == 1).sum()
    assert positions_T.max() == 38  # the last token is predicted, never predicts


def test_the_shortest_model_still_gets_a_batch() -> None:
    experience = probe_experience(num_sequences=8, vocab_size=3, longest=2, seed=0)
    assert (experience.prompt_length_B + experience.response_length_B).max() == 2


def test_old_logprobs_stay_inside_the_clip_range() -> None:
    experience = probe_experience(num_sequences=8, vocab_size=11, longest=40, seed=3)
    logprob_T = np.full(experience.num_sampled_tokens, -1.5, dtype=np.float32)
    batch = probe_batch(experience, logprob_T, seed=0)
    ratio_T = np.exp(logprob_T - batch.old_logprob_T)
    assert ratio_T.min() > 0.9 and ratio_T.max() < 1.1 and ratio_T.std() > 0.01
    assert (batch.advantage_B < 0).any() and abs(batch.advantage_B.sum()) > 1


def test_the_profile_separates_the_first_position() -> None:
    experience = probe_experience(num_sequences=8, vocab_size=11, longest=40, seed=3)
    reference_T = np.zeros(experience.num_sampled_tokens, dtype=np.float32)
    off_T = np.where(positions(experience) == 0, 0.0, 0.25).astype(np.float32)
    profile = position_profile(experience, off_T, reference_T)
    assert (profile.first, profile.later) == (0.0, 0.25)
    assert profile.depends_on_position
    assert not position_profile(experience, off_T + 1.0, reference_T).depends_on_position


def test_a_sketch_is_linear_and_keeps_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(300, 500, generator=generator) for _ in range(2))
    np.testing.assert_allclose(
        tensor_sketch(one) - tensor_sketch(other), tensor_sketch(one.double() - other.double()), atol=1e-9
    )
    ratio = np.linalg.norm(tensor_sketch(one)) / float(one.norm())
    assert 0.8 < ratio < 1.2  # five standard deviations of 4.4 %
    even = torch.ones(300, 500)  # no cancellation, no coherence
    assert 0.8 < np.linalg.norm(tensor_sketch(even)) / float(even.norm()) < 1.2
    assert np.linalg.norm(tensor_sketch(one) - tensor_sketch(one.flip(0))) > 0.5 * float(one.norm())


def test_without_transformers_the_majority_is_believed() -> None:
    items = [measurement("own", grad_norm=1.5), measurement("tp 2"), measurement("pp 2"), measurement("cp 2")]
    assert items[choose_anchor(items, None)].name != "own"


def test_transformers_outvotes_a_majority() -> None:
    items = [measurement("own", grad_norm=1.5), measurement("dp 2", grad_norm=1.5), measurement("tp 2")]
    truth = Truth(logprob_T=LOGPROB_T, token_entropy=0.8, loss=-1.0, grad_norm=3.0)
    assert items[choose_anchor(items, truth)].name == "tp 2"
    assert items[choose_anchor(items, None)].name == "own"


def failures(rows: list[Check]) -> set[tuple[str, str]]:
    return {(row.subject, row.measure) for row in rows if row.status == "fail"}


def test_each_number_of_a_layout_has_its_row() -> None:
    anchor = measurement("own")
    items = [
        anchor,
        measurement("loss", loss=-1.0 - 2e-5),
        measurement("entropy", token_entropy=0.8 + 2e-5),
        measurement("gradient", grad_norm=3.0 + 6e-5),
        measurement("tokens", logprob_T=LOGPROB_T + np.float32(2e-4)),
        measurement("weights", step_C={"a": np.ones(4), "b": np.full(4, 2.001)}),
    ]
    rows, moved = compare_layouts(items, anchor, TOLERANCES["fp32"])
    assert failures(rows) == {
        ("loss", "loss"),
        ("entropy", "token entropy"),
        ("gradient", "gradient norm"),
        ("tokens", "log-probability, max"),
        ("weights", "step"),
    }
    assert moved == {"weights": ("b",)}


def test_transformers_rows_compare_the_mean_over_tokens() -> None:
    truth = Truth(logprob_T=LOGPROB_T + np.float32(1e-3), token_entropy=0.8, loss=-1.0, grad_norm=3.0)
    assert failures(compare_with_truth(measurement("own"), truth, TOLERANCES["fp32"])) == {
        ("own", "log-probability, mean")
    }
    assert failures(compare_with_truth(measurement("own"), truth, TOLERANCES["bf16"])) == set()


def test_the_table_has_a_line_per_check_and_says_why_one_was_skipped() -> None:
    rows = [
        Check("layouts", "loss", "tp 2", "pass", -1.0, -1.0, 1e-5),
        Check("transformers", "all", "reference", "skipped", note="--reference=never"),
    ]
    lines = table_text(rows).splitlines()
    assert len(lines) == 4
    assert lines[2].split() == ["layouts:", "loss", "tp", "2", "-1", "-1", "1e-05", "rel", "pass"]
    assert lines[3].endswith("skipped  --reference=never")
    assert verdict_text(rows, 3.4) == "doctor: fit; 1 passed, 0 failed, 1 skipped in 3 s"
