"""What a dry run finds: every fault at once, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from aer_megatron.compose.common import architecture
from aer_megatron.compose.dry_run import Findings, dry_run
from aer_megatron.compose.step_plan import StepPlan
from aer_megatron.config_loading import load_config
from aer_megatron.costs.model_size import Layout
from aer_megatron.files.run_lock import RunLock
from aer_megatron.report.writer import write_run_manifest
from aer_megatron.train import COMMAND
from tests.support.runs import MODEL, random_base, write_run_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    random_base(folder / "base")
    write_run_file(folder)
    return folder


def look(folder: Path, *overrides: str, stage: str = "rl", ranks: int = 1) -> tuple[str, Findings]:
    before = sorted(folder.rglob("*"))
    result = dry_run(load_config(folder / "run.toml", overrides), stage, ranks)
    assert sorted(folder.rglob("*")) == before
    return result


def test_a_good_run_has_no_problem(folder: Path) -> None:
    text, found = look(folder, "--parallel.tp=2")
    assert found == Findings()
    for line in ("8 prompts x 4 = 32 sequences", "2 = tp 2 x pp 1 x dp 1", "1 per optimizer step and rank, of <= 16"):
        assert line in text
    assert text.splitlines()[-1] == (
        "  evaluation           countdown: 8 prompts x 4 = 32 sequences of <= 10 tokens at temperature 1, 3 times"
    )


def test_a_long_evaluation_counts_in_memory_and_in_positions(folder: Path) -> None:
    config = load_config(folder / "run.toml")
    layout = Layout(1, 1, 1, 1, False, "none", 1, 1)

    def rollout_bytes(**changes: object) -> int:
        changed = config.with_options({f"eval.sets.countdown.{name}": value for name, value in changes.items()})
        return StepPlan(changed, architecture(config.model.path)).engine_memory(layout).rollout

    training = rollout_bytes(every=0)
    assert rollout_bytes(num_prompts=8, num_samples=4) == training  # as many sequences, as long
    assert rollout_bytes(num_prompts=16) > 1.8 * training
    assert rollout_bytes(max_new_tokens=40) > 1.8 * training
    assert rollout_bytes(num_prompts=16, max_new_tokens=40, every=0) == training
    problems = look(folder, "--eval.sets.countdown.max_new_tokens=60")[1].problems
    assert problems == [
        "data.max_prompt_tokens=12 + eval.sets.countdown.max_new_tokens=60 exceeds the model's 64 positions; lower one"
    ]


def test_context_parallel_ranks_count_and_packed_batches_are_packed(folder: Path) -> None:
    text, found = look(folder, "--parallel.cp=2", "--parallel.tokens_per_micro_batch=128")
    assert found == Findings()
    assert "2 = tp 1 x pp 1 x cp 2 x dp 1" in text
    assert "packed, of <= 128 tokens: at most 4 per optimizer step and rank" in text
    # two chunks a rank, and tensor-parallel pieces of them: 53 tokens take 56, so that two sequences do not fit 108
    text, found = look(
        folder, "--parallel.cp=2", "--parallel.tp=2", "--parallel.sequence_parallel=true",
        "--parallel.tokens_per_micro_batch=108", "--rollout.max_new_tokens=3", "--data.max_prompt_tokens=50",
    )  # fmt: skip
    assert "packed, of <= 108 tokens: at most 16 per optimizer step and rank" in text
    odd = look(folder, "--parallel.cp=2", ranks=3)[1].problems
    assert "parallel.cp=2 = 2 must divide the number of ranks 3" in odd[0]


def test_every_fault_is_listed_at_once(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "1", "answer": "1"}\n{"problem": "2"}\n')
    (tmp_path / "file").write_text("")
    text, found = look(
        folder,
        f'--data.train={{path = "{data}"}}',
        "--eval.sets.other.source.task=reasoning_gym:no_such_task",
        f"--run.output_dir={tmp_path}/file/out",
        "--parallel.tp=3",
        "--rollout.max_new_tokens=500",
        "--rollout.engine=sglang",
        "--sglang.num_servers=1",
        "--sglang.api_key_env=NO_SUCH_VARIABLE_HERE",
        ranks=4,
    )
    words = ("parallel.tp=3", "line 2", "no_such_task", "is no folder", "NO_SUCH_VARIABLE")
    for word in (*words, "exceeds the model's 64 positions"):
        assert any(word in problem for problem in found.problems), (word, found.problems)
    assert '"tokens_per_micro_batch"' in text


@pytest.mark.processes
def test_a_verifier_that_cannot_be_imported_and_what_is_skipped(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "1", "answer": "1"}\n{"problem": "2"}\n{"problem": "3"}\n')
    options = (f'--data.train={{path = "{data}"}}', "--data.on_bad_record=skip", "--data.verifier=no.such:function")
    found = look(folder, *options)[1]
    assert len(found.problems) == 1
    assert "no.such:function" in found.problems[0]
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"data.train: 2 of 3 records are bad and left out; the first: {data}, line 2: ")


def test_folders_of_models_and_of_other_runs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunLock(out / "run.lock", option="", job="SLURM_JOB_ID 12"):
        problems = look(folder, f"--run.output_dir={out}", f"--model.path={MODEL}")[1].problems
    assert any("in use by another run" in text and "SLURM_JOB_ID 12" in text for text in problems)
    assert any("safetensors" in text for text in problems)  # weights are looked for, none are read
    missing = look(folder, "--model.path=/nonexistent")[1].problems
    assert len(missing) == 1
    assert "model.path='/nonexistent' is not a folder" in missing[0]


@pytest.mark.processes
def test_a_damaged_checkpoint_of_the_folder_is_a_problem(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "out" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{")
    config = load_config(folder / "run.toml")
    write_run_manifest(tmp_path / "out", config, {}, command=["x"], num_ranks=1)
    problems = look(folder, f"--run.output_dir={tmp_path}/out")[1].problems
    assert any("manifest.json" in text for text in problems)


def test_the_supervised_stage_is_looked_at(folder: Path, tmp_path: Path) -> None:
    fine = look(folder, f"--model.path={tmp_path}/new", stage="sft")[1]
    assert fine.problems == []
    bad = look(folder, "--sft.batch_size=7", "--sft.source.task=reasoning_gym:chain_sum", stage="sft", ranks=2)[1]
    assert any("sft.batch_size=7 must be a multiple" in text for text in bad.problems)
    assert any("was not made by --stage=sft" in text for text in bad.problems)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--run.num_steps", "5"), "write --run.num_steps=5"),
        (("run.num_steps=5",), "write --run.num_steps=5"),
        (("-run.num_steps=5",), "write --run.num_steps=5"),
        (("--algo.entropy.kind", "none"), "write --algo.entropy.kind=none"),
        (("--run.resume", "--dry-run"), "write --run.resume=VALUE"),
        (("--run.name", "two words"), "write '--run.name=two words'"),
        (("--dryrun",), "did you mean --dry-run?"),
    ],
)
@pytest.mark.parametrize("first", [("run.toml",), ()])
def test_options_of_another_spelling_get_the_right_one(
    first: tuple[str, ...], arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError) as error:
        COMMAND.parse([*first, *arguments, *([] if first else ["run.toml"])])
    assert words in str(error.value)


def test_the_commands_own_words_are_left_to_it() -> None:
    given = COMMAND.parse(["a=b.toml", "--stage", "rl", "--stage=sft", "--dry-run", "--run.seed=1"])
    assert (given.place, given["stage"], given["dry-run"], given.overrides) == (
        "a=b.toml",
        "sft",
        True,
        ("--run.seed=1",),
    )
