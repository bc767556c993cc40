"""The data tool on real sets, where they lie beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aer_megatron.prepare_data.command import main

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"
DAPO = FOLDER / "dapo_math_17k_dedup.jsonl"
EVALUATION = [FOLDER / f"{name}.jsonl" for name in ("aime24", "aime25", "amc23", "math500")]

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no ../shared/data beside the project")


@pytest.mark.processes
def test_golds_of_math500_are_judged_and_dapo_has_problems_with_two_answers(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    files = [*map(str, EVALUATION), str(DAPO)]
    assert main(["check", *files, "--json", str(report), "--timeout", "30"]) == 0
    found = json.loads(report.read_text())["files"]
    assert [found[str(file)]["without_fault"] for file in EVALUATION] == [30, 30, 40, 500]
    assert [found[file]["not_judged"] for file in files] == [[]] * 5
    two = found[str(DAPO)]["several_answers"]
    assert (len(two), sum(map(len, two))) == (6, 12)
    assert all(len({item["answer"] for item in group}) == 2 for group in two)


def test_dapo_has_problems_of_the_evaluation_sets(tmp_path: Path) -> None:
    against = [argument for file in EVALUATION for argument in ("--against", str(file))]
    outputs = ["--output", str(tmp_path / "clean.jsonl"), "--json", str(tmp_path / "report.json")]
    assert main(["decontaminate", str(DAPO), *against, *outputs]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    hits = report["hits"]
    assert sum(hit["kind"] == "identical" for hit in hits) == 7
    assert all(hit["train"]["problem"] == hit["evaluation"]["problem"] for hit in hits if hit["kind"] == "identical")
    assert sum(hit["kind"] == "exact" for hit in hits) == 8
    reworded = [hit for hit in hits if "Flora the frog" in hit["evaluation"]["problem"]]
    assert reworded and {hit["kind"] for hit in reworded} == {"ngram"}
    assert report["kept"] == 17255 - len(hits) == len((tmp_path / "clean.jsonl").read_text().splitlines())
    again = ["decontaminate", str(tmp_path / "clean.jsonl"), *against, "--json", str(tmp_path / "again.json")]
    assert main(again) == 0
    assert json.loads((tmp_path / "again.json").read_text())["hits"] == []
