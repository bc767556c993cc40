"""Metric names: complete, unique, described, and unknown ones refused."""

from __future__ import annotations

import numpy as np
import pytest

from aer_megatron.algo.flight import BUCKETS, BucketSums, bucket_means
from aer_megatron.report.metrics import (
    DIFFICULTY,
    FAMILIES,
    Metric,
    by_difficulty,
    of_set,
    pass_at,
    pass_k,
    reason_count,
    unit_of,
)
from tools import write_metrics_docs

REQUIRED = (
    "step",
    "reward/mean",
    "entropy/token_mean",
    "entropy/initial",
    "entropy/target",
    "aer/alpha",
    "aer/coefficient",
    "aer/difficulty_mean",
    "rollout/logprob_diff_max",
    "rollout/logprob_diff_mean",
    "rollout/mismatch_kl",
    "rollout/sample_size",
    "rollout/staleness_max",
    "rollout/staleness_mean",
    "rollout/groups_aborted",
    "rollout/response_length_mean",
    "rollout/truncated_share",
    "rollout/prompt_tokens",
    "rollout/response_tokens",
    "rollout/groups_dropped",
    "rollout/refills",
    "reward/solved_all",
    "reward/solved_none",
    "rewards/reason/no_answer",
    "loss/policy",
    "loss/entropy_bonus",
    "loss/total",
    "train/grad_norm",
    "train/lr",
    "train/clip_low",
    "train/clip_high",
    "train/approx_kl",
    "eval/aime24/pass@1",
    "eval/aime24/pass@32",
    "eval/aime24/pass@32_low",
    "eval/aime24/pass@32_high",
    "eval/aime24/avg@64",
    "eval/aime24/maj@8",
    "eval/aime24/response_length_mean",
    "eval/aime24/truncated",
    "aer/reason",
    "difficulty/prompts/unsolved",
    "difficulty/token_entropy/hard",
    "difficulty/reward/medium",
    "difficulty/response_length/easy",
    "difficulty/coefficient/hard",
    "aer/alarm",
    "aer/held",
    "aer/frozen",
    "time/step_s",
    "time/rollout_s",
    "time/reward_s",
    "time/score_s",
    "time/train_s",
    "time/sync_s",
    "time/eval_s",
    "time/checkpoint_s",
    "time/tokens_per_s",
    "time/peak_rss_gb",
    "perf/mfu",
    "perf/tokens_per_s_per_gpu",
    "perf/rollout_tokens_per_s",
    "perf/idle_share",
    "perf/peak_memory_gb",
    "perf/peak_memory_of_plan",
)


@pytest.mark.parametrize("name", REQUIRED)
def test_the_names_that_users_rely_on_exist(name: str) -> None:
    assert unit_of(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("reward/maen", "reward/mean"),
        ("entropy/tokenmean", "entropy/token_mean"),
        ("eval/math500/pass@0", "eval/NAME/pass@K"),
        ("eval/NAME/pass@8", "eval/NAME/pass@K"),
        ("rewards/reason/No Answer", "rewards/reason/LABEL"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError) as caught:
        unit_of(name)
    assert f"unknown metric {name!r}: nearest is {nearest!r}" in str(caught.value)


def test_families_spell_and_read_their_names() -> None:
    assert pass_at("aime24", 8) == "eval/aime24/pass@8"
    assert pass_k("eval/aime24/pass@32") == ("aime24", 32)
    assert pass_k("eval/aime24/pass@32_low") is None
    assert of_set("aime24", "pass@K_low", 8) == "eval/aime24/pass@8_low"
    assert of_set("aime24", "truncated") == "eval/aime24/truncated"
    assert reason_count("no_answer") == "rewards/reason/no_answer"


def test_a_family_refuses_what_it_could_not_read_back() -> None:
    for measure, k in (("pass@K", 0), ("pass@K", None), ("truncated", 1), ("pass@8", None)):
        with pytest.raises(ValueError, match="is none of an evaluation set"):
            of_set("aime24", measure, k)
    with pytest.raises(ValueError, match="snake_case"):
        reason_count("No answer")
    for measure, bucket in (("reward", "impossible"), ("rewards", "hard")):
        with pytest.raises(ValueError, match="buckets: unsolved, hard, medium, easy"):
            by_difficulty(measure, bucket)


def test_every_measure_of_a_difficulty_bucket_has_a_name() -> None:
    ones = np.ones(len(BUCKETS), dtype=np.int64)
    means = bucket_means(BucketSums(ones, ones, ones, 1.0 * ones, 1.0 * ones, 1.0 * ones), 0.5)
    assert list(means) == list(BUCKETS)
    for bucket, row in means.items():
        assert row.keys() == DIFFICULTY.keys()
        assert all(unit_of(by_difficulty(measure, bucket)) for measure in row)


def test_a_metric_is_its_name() -> None:
    assert Metric.REWARD_MEAN == "reward/mean"
    assert {Metric.REWARD_MEAN: 1.0}["reward/mean"] == 1.0
    assert f"{Metric.REWARD_MEAN}" == "reward/mean"


def test_every_metric_has_a_unit_and_a_meaning_of_its_own() -> None:
    meanings = [metric.meaning for metric in Metric] + [family.meaning for family in FAMILIES]
    assert all(metric.unit for metric in Metric)
    assert all(meanings)
    assert len(set(meanings)) == len(meanings)


def test_the_metrics_document_is_current() -> None:
    written = write_metrics_docs.PATH.read_text(encoding="utf-8")
    assert written == write_metrics_docs.render(), "run: python tools/write_metrics_docs.py"
