"""The command line over stand-in servers: stale rollouts within their bound, interrupted, resumed, over-sampled."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from aer_megatron._C import DifficultyLedger
from aer_megatron.config import Config
from aer_megatron.report.flight import read_flight
from tests.support.runs import MODEL, metric_lines, train, write_run_file
from tests.support.sglang_double import SGLangDouble
from tests.support.signalled_runs import num_lines, started

pytestmark = pytest.mark.integration
NUM_STEPS, NUM_SEQUENCES = 6, 8 * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file and a random base model."""
    folder = tmp_path_factory.mktemp("async")
    write_run_file(folder)
    shutil.copytree(MODEL, folder / "base")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL)).float().save_pretrained(folder / "base")
    return folder


@pytest.fixture
def servers(base: Path) -> Iterator[list[SGLangDouble]]:
    with (
        SGLangDouble(base / "base", token_s=0.02, vocab_size=20) as first,
        SGLangDouble(base / "base", token_s=0.02, vocab_size=20) as second,
    ):
        yield [first, second]
        assert first.running == {} and second.running == {}  # no request is leaked


def options(output: Path, servers: list[SGLangDouble]) -> list[str]:
    """Returns the options of a run whose tokens are made up: neither gate nor controller can like them."""
    return [
        f"--run.output_dir={output}",
        "--rollout.engine=sglang",
        f"--sglang.urls={json.dumps([server.url for server in servers])}",
        "--rollout.logprob_gate=0",
    ]


def run(
    base: Path, output: Path, servers: list[SGLangDouble], *arguments: str, ranks: int = 1
) -> list[dict[str, float]]:
    """Returns the metrics of a run to its end."""
    done = train(base / "run.toml", *options(output, servers), *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    lines = metric_lines(output)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    for line in lines[:-1]:  # every sample is judged, and once; the last line is of evaluation alone
        assert sum(count for name, count in line.items() if name.startswith("rewards/reason/")) == NUM_SEQUENCES
    return lines


def attempts(output: Path) -> dict[int, int]:
    """Returns how many rollouts of each prompt the last checkpoint's ledger has counted."""
    rows = DifficultyLedger.load(str(max((output / "checkpoints").iterdir()) / "ledger")).export()
    return dict(zip(rows.prompt_ids.tolist(), rows.attempts.tolist(), strict=True))


def test_stale_rollouts_stay_within_the_bound_and_a_resume_counts_nothing_twice(
    base: Path, servers: list[SGLangDouble], tmp_path: Path
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    lines = run(base, straight, servers, "--rollout.staleness=2", "--rollout.max_new_tokens=30")
    evaluated = lines.pop()
    staleness = [line["rollout/staleness_max"] for line in lines]
    assert staleness[0] == 0 and 1 <= max(staleness) <= 2
    assert all(0 <= line["rollout/staleness_mean"] <= line["rollout/staleness_max"] for line in lines)
    assert sum(attempts(straight).values()) == NUM_STEPS * NUM_SEQUENCES
    # the double's log-probabilities are made up, so alpha is held, and the replay knows it
    assert all(line["aer/held"] and "mismatch" in str(line["aer/reason"]) for line in lines)
    records = read_flight(straight)
    assert [r.observation.mismatch_kl for r in records] == [line["rollout/mismatch_kl"] for line in lines]
    assert records[-1].state.held_steps == NUM_STEPS

    shutil.copytree(straight, resumed)
    shutil.rmtree(max((resumed / "checkpoints").iterdir()))
    [checkpoint] = (resumed / "checkpoints").iterdir()
    waiting = json.loads((checkpoint / "manifest.json").read_text())["state"]["pending"]
    assert [batch["step"] for batch in waiting] == [4, 5]
    again = run(base, resumed, servers, "--rollout.staleness=2", "--rollout.max_new_tokens=30")
    assert again[:4] == lines[:4]
    assert evaluated.keys() == again[-1].keys()
    assert attempts(resumed) == attempts(straight)  # prompt by prompt


def test_servers_answer_evaluation_beside_training_and_change_no_number(
    base: Path, servers: list[SGLangDouble], tmp_path: Path
) -> None:
    in_turn = run(base, tmp_path / "in_turn", servers, "--run.num_steps=4", ranks=2)
    beside = run(base, tmp_path / "beside", servers, "--run.num_steps=4", "--eval.overlap=true", ranks=2)
    assert [line["step"] for line in beside if "eval/countdown/pass@4" in line] == [0, 3, 4]
    assert beside == in_turn


def test_a_stopped_run_leaves_no_request_behind_and_goes_on_with_what_it_had_drawn(
    base: Path, servers: list[SGLangDouble], tmp_path: Path
) -> None:
    stale = ("--rollout.staleness=2", "--rollout.max_new_tokens=30", "--run.checkpoint_every=0")
    out = tmp_path / "out"
    with started(tmp_path, base / "run.toml", *options(out, servers), *stale) as (rank,):
        rank.until(lambda: num_lines(out / "metrics.jsonl") >= 2)
        rank.send(signal.SIGTERM)
        assert rank.wait() == 143, rank.said
    done = num_lines(out / "metrics.jsonl")
    assert done < NUM_STEPS
    assert f"the same command goes on at step {done}\n" in rank.said
    assert "Traceback" not in rank.said
    deadline = time.monotonic() + 60
    while any(server.running for server in servers) and time.monotonic() < deadline:  # aborted as the run ends
        time.sleep(0.05)
    assert [server.running for server in servers] == [{}, {}]
    lines = run(base, out, servers, *stale)
    assert len(lines) == NUM_STEPS + 1
    assert sum(attempts(out).values()) == NUM_STEPS * NUM_SEQUENCES


def test_over_sampling_aborts_stragglers_and_counts_whole_groups_alone(
    base: Path, servers: list[SGLangDouble], tmp_path: Path
) -> None:
    # two ranks: each has its share of the race and of what a publication interrupts
    raced = ("--rollout.staleness=1", "--rollout.oversample=1.5", "--run.num_steps=3", "--eval.sets={}")
    lines = run(base, tmp_path / "out", servers, "--parallel.tp=2", *raced, ranks=2)
    assert [line["rollout/groups_aborted"] for line in lines] == [4, 4, 4]  # 12 launched, 8 trained on
    assert max(line["rollout/staleness_max"] for line in lines) <= 1
    counted = attempts(tmp_path / "out")
    assert sum(counted.values()) == 3 * NUM_SEQUENCES
    assert np.all(np.array(list(counted.values())) % 4 == 0)  # whole groups
    assert sum(server.num_completed for server in servers) > 3 * NUM_SEQUENCES
    assert sum(len(server.aborts) for server in servers) > 0
    table = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert Config.from_table(table).rollout.oversample == 1.5
