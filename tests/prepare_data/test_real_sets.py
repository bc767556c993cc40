"""The data tool on real sets, where they lie beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aer_megatron.prepare_data.command import main
from tests.support.runs import ROOT

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"
DAPO = FOLDER / "dapo_math_17k_dedup.jsonl"
EVALUATION = [FOLDER / f"{name}.jsonl" for name in ("aime24", "aime25", "amc23", "math500")]
AGAINST = [argument for file in EVALUATION for argument in ("--against", str(file))]

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no ../shared/data beside the project")


@pytest.mark.processes
def test_every_gold_of_the_evaluation_sets_is_judged_correct(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    files = [str(file) for file in EVALUATION]
    assert main(["check", *files, "--json", str(report), "--timeout", "30"]) == 0
    found = json.loads(report.read_text())["files"]
    assert [found[file]["without_fault"] for file in files] == [30, 30, 40, 500]
    assert [found[file]["not_judged"] for file in files] == [[]] * 4


@pytest.mark.processes
def test_the_training_set_of_the_paper_recipe(tmp_path: Path) -> None:
    checked, train, report = tmp_path / "checked.jsonl", tmp_path / "train.jsonl", tmp_path / "report.json"
    assert main(["check", str(DAPO), "--output", str(checked), "--json", str(report)]) == 0
    two = json.loads(report.read_text())["files"][str(DAPO)]["several_answers"]
    assert (len(two), sum(map(len, two))) == (6, 12)
    assert all(len({item["answer"] for item in group}) == 2 for group in two)
    assert main(["decontaminate", str(checked), *AGAINST, "--output", str(train)]) == 0
    sizes = [f"{len(file.read_text().splitlines()):,}" for file in (DAPO, checked, train)]
    assert sizes == ["17,255", "16,680", "16,622"]
    page = (ROOT / "examples" / "paper" / "README.md").read_text()
    assert all(size in page for size in sizes)


def test_dapo_has_problems_of_the_evaluation_sets(tmp_path: Path) -> None:
    outputs = ["--output", str(tmp_path / "clean.jsonl"), "--json", str(tmp_path / "report.json")]
    assert main(["decontaminate", str(DAPO), *AGAINST, *outputs]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    hits = report["hits"]
    assert sum(hit["kind"] == "identical" for hit in hits) == 7
    assert all(hit["train"]["problem"] == hit["evaluation"]["problem"] for hit in hits if hit["kind"] == "identical")
    assert sum(hit["kind"] == "exact" for hit in hits) == 8
    reworded = [hit for hit in hits if "Flora the frog" in hit["evaluation"]["problem"]]
    assert reworded and {hit["kind"] for hit in reworded} == {"ngram"}
    assert report["kept"] == 17255 - len(hits) == len((tmp_path / "clean.jsonl").read_text().splitlines())
    again = ["decontaminate", str(tmp_path / "clean.jsonl"), *AGAINST, "--json", str(tmp_path / "again.json")]
    assert main(again) == 0
    assert json.loads((tmp_path / "again.json").read_text())["hits"] == []
