"""Data sets of the hub, from a double of it on the loopback: found, downloaded once, and read without a network."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aer_megatron.data.hub import dataset_files
from aer_megatron.data.sources import load_records
from aer_megatron.options.data import SourceSection
from tests.support.hub_double import HubDouble, use_hub


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def problems(*numbers: int) -> bytes:
    return parquet([{"problem": f"what is {number}", "answer": str(number)} for number in numbers])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    sets = {
        "some/set": {
            "default/train/0000.parquet": problems(1, 2),
            "default/train/0001.parquet": problems(3),
            "default/test/0000.parquet": problems(4),
            "README.md": b"trust me",
            "default/../../escape.parquet": b"x",
            "set.py": b"import os",
        },
        "some/two": {"main/train/0000.parquet": problems(5), "other/partial-train/0000.parquet": problems(6)},
    }
    with HubDouble(sets) as double:
        use_hub(monkeypatch, double.url, tmp_path / "cache")
        yield double


def answers(source: SourceSection) -> list[str]:
    found = load_records(source, on_bad_record="error", default_verifier="math", may_name=lambda name: False)
    return [record.answer for record in found.records]


def test_a_split_is_its_files_in_order_and_is_downloaded_once(hub: HubDouble, tmp_path: Path) -> None:
    source = SourceSection(dataset="some/set", split="train")
    assert answers(source) == ["1", "2", "3"]
    assert answers(SourceSection(dataset="some/set", split="test", subset="default")) == ["4"]
    assert answers(source) == ["1", "2", "3"]
    assert [count for asked, count in hub.asked.items() if asked.startswith("GET datasets")] == [1, 1, 1]
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".py", ".md") or file.stem == "escape"]


def test_what_the_cache_has_needs_no_hub(hub: HubDouble) -> None:
    source = SourceSection(dataset="some/set", split="train")
    assert answers(source) == ["1", "2", "3"]
    hub.status = 403
    assert answers(source) == ["1", "2", "3"]
    hub.status = None
    hub.stop()
    assert answers(source) == ["1", "2", "3"]
    with pytest.raises(RuntimeError, match="is not in the cache and http://127"):
        dataset_files("some/set", split="test")
    hub.start()


@pytest.mark.parametrize(
    ("dataset", "split", "subset", "words"),
    [
        ("some/none", "train", None, r"dataset='some/none' is no set that the hub gives"),
        ("some/set", "dev", None, r"split='dev' is none of .*it has the splits test, train"),
        ("some/set", "train", "main", r"subset='main' is none of .*the subsets default"),
        ("some/two", "train", None, r"has the subsets main, other; give subset"),
        ("some/two", "train", "other", r"of which the hub's Parquet form is cut"),
    ],
)
def test_what_the_hub_has_not(hub: HubDouble, dataset: str, split: str, subset: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataset_files(dataset, split=split, subset=subset)


def test_a_set_that_is_too_large_is_not_downloaded(hub: HubDouble) -> None:
    hub.sizes["default/train/0000.parquet"] = 1 << 40
    with pytest.raises(ValueError, match="at most 8589934592 are read"):
        dataset_files("some/set", split="train")
    assert not [asked for asked in hub.asked if asked.startswith("GET datasets")]


@pytest.mark.parametrize("body", [b"<html>", b"[1, 2]", b"{}", b'{"sha": 3}', b"null"])
def test_what_is_no_hub_is_told(hub: HubDouble, body: bytes) -> None:
    hub.body = body
    with pytest.raises(RuntimeError, match=r"answers what no hub does|cannot give it"):
        dataset_files("some/set", split="train")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dataset": "some/set"}, "dataset and split belong together"),
        ({"path": "x.jsonl", "split": "train"}, "dataset and split belong together"),
        ({"path": "x.jsonl", "subset": "main"}, "subset belongs to dataset"),
        ({"dataset": "some/set", "split": "train", "task": "countdown"}, "exactly one of path, task and dataset"),
        ({"dataset": "../set", "split": "train"}, "dataset"),
        ({"dataset": "a/b/c", "split": "train"}, "dataset"),
        ({"dataset": "a/b", "split": "../train"}, "split"),
        ({"dataset": "a/b", "split": "*"}, "split"),
    ],
)
def test_options_that_cannot_work(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SourceSection.from_table(fields)
