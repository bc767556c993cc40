"""Known sets from a double of the hub, by the command as a user starts it, and from files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aer_megatron.prepare_data.command import main
from tests.support.hub_double import HubDouble, use_hub
from tests.support.runs import ROOT


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def gsm8k(*numbers: int) -> bytes:
    return parquet([{"question": f"how many, {number}?", "answer": f"so\n#### {number}"} for number in numbers])


def algebra(subset: str) -> bytes:
    return parquet([{"problem": subset, "solution": r"\boxed{x^2}", "level": "Level 1", "type": subset}])


SUBSETS = ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"]
SUBSETS += ["precalculus"]
SETS = {
    "openai/gsm8k": {"main/train/0000.parquet": gsm8k(1, 2, 2), "main/test/0000.parquet": gsm8k(3)}
    | {"socratic/test/0000.parquet": gsm8k(4)},
    "EleutherAI/hendrycks_math": {f"{subset}/train/0000.parquet": algebra(subset) for subset in SUBSETS},
    "math-ai/amc23": {"default/test/0000.parquet": parquet([{"question": "q", "answer": 1.0}, {"question": None}])},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    with HubDouble(SETS) as double:
        use_hub(monkeypatch, double.url, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield double


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.processes
def test_the_command_takes_sets_from_the_hub_that_the_environment_names(hub: HubDouble, tmp_path: Path) -> None:
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "aer_megatron.cli", "data", "fetch", "gsm8k_train", "gsm8k_test"]
    done = subprocess.run(
        [*command, "--output", "sets", "--json", "report.json"],
        cwd=tmp_path,
        env=os.environ | place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "sets" / "gsm8k_test.jsonl") == [{"problem": "how many, 3?", "answer": "3"}]
    assert [row["answer"] for row in lines(tmp_path / "sets" / "gsm8k_train.jsonl")] == ["1", "2"]
    report = json.loads((tmp_path / "report.json").read_text())["sets"]["gsm8k_train"]
    assert (report["problems"], report["repeated_rows"], report["known_size"]) == (2, 1, 7473)
    assert "2, not 7473" in done.stdout


def test_a_set_of_several_subsets_is_all_of_them(hub: HubDouble, tmp_path: Path) -> None:
    assert main(["fetch", "math_train"]) == 0
    assert [row["problem"] for row in lines(tmp_path / "data" / "math_train.jsonl")] == SUBSETS
    assert lines(tmp_path / "data" / "math_train.jsonl")[0] == {
        "problem": "algebra",
        "answer": "x^2",
        "level": "Level 1",
        "type": "algebra",
    }


def test_bad_rows_of_a_set_are_counted(hub: HubDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "amc23", "--json", "report.json"]) == 0
    assert lines(tmp_path / "data" / "amc23.jsonl") == [{"problem": "q", "answer": "1"}]
    (bad,) = json.loads(Path("report.json").read_text())["sets"]["amc23"]["bad_rows"]
    assert (bad["where"], bad["reason"][:20]) == ("test, row 2", '"problem" (or "promp')


def test_a_file_of_a_set_is_taken_without_a_hub(hub: HubDouble, tmp_path: Path) -> None:
    Path("here.parquet").write_bytes(gsm8k(7))
    assert main(["fetch", "gsm8k_test", "--from", "here.parquet", "--output", "there"]) == 0
    assert lines(tmp_path / "there" / "gsm8k_test.jsonl") == [{"problem": "how many, 7?", "answer": "7"}]
    assert not hub.asked


def test_what_cannot_be_fetched(hub: HubDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.jsonl").write_text('{"question": "no answer"}\n')
    Path("data").mkdir()
    Path("data/aime24.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    for arguments, words in [
        (["fetch", "gsm9k"], "gsm9k is no known set; use dapo_math_17k, gsm8k_train"),
        (["fetch", "math500"], "dataset='HuggingFaceH4/MATH-500' is no set that the hub gives"),
        (["fetch", "aime24", "aime25", "--from", "own.jsonl"], "--from is one file"),
        (["fetch", "gsm8k_test", "--from", "own.jsonl"], "own.jsonl holds no record; the first of 1 bad rows, line 1"),
        (["fetch", "aime24", "--from", "data/aime24.jsonl"], "data/aime24.jsonl is read or written already"),
        (["fetch", "gsm8k_test", "--output", "own.jsonl"], "own.jsonl/gsm8k_test.jsonl cannot be written"),
    ]:
        assert main(arguments) == 2, arguments
        assert words in capsys.readouterr().err
    hub.stop()
    assert main(["fetch", "gsm8k_train"]) == 1
    assert "is not in the cache and http://127.0.0.1" in capsys.readouterr().err
    hub.start()
