"""report.html: its numbers are those of metrics.jsonl, what runs recorded is inert, and it needs nothing else."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.report import page_samples as samples_module
from aer_megatron.report.charts import chart_sections
from aer_megatron.report.command import main
from aer_megatron.report.flight import FlightWriter
from aer_megatron.report.html import embedded, page, write_html
from aer_megatron.report.page_data import page_data, thinned
from aer_megatron.report.page_samples import last_boxed, page_samples
from aer_megatron.report.serving import ReportServer
from aer_megatron.report.writer import MetricsWriter, read_metrics
from tests.support.flights import flight_records
from tests.support.page_runs import HOSTILE, page_run, reward_hack, sample_row, write_samples


class Page(HTMLParser):
    """The elements of a page, and the text of its data block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.comments: list[str] = []
        self.block = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        self.block += data if self._in_data else ""

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.block)


def test_the_numbers_of_the_page_are_those_of_the_file(tmp_path: Path) -> None:
    run = page_run(tmp_path, 60)
    (shown,) = Page(page([run])).data["runs"]
    records = read_metrics(run / "metrics.jsonl")
    assert shown["steps"] == [record["step"] for record in records]
    names = {name for record in records for name, value in record.items() if isinstance(value, float)}
    assert set(shown["curves"]) >= names
    for name in names:
        assert shown["curves"][name] == [record.get(name) for record in records], name
    assert shown["alarms"] == [[7, "entropy collapse at step 7"]]
    assert not shown["thinned"]


def test_every_curve_is_in_a_chart_and_an_interval_belongs_to_its_pass_at_k(tmp_path: Path) -> None:
    data = page_data([page_run(tmp_path, 12)])
    series = [each for section in data["sections"] for chart in section["charts"] for each in chart["series"]]
    drawn = {each[key] for each in series for key in ("name", "low", "high") if key in each}
    assert drawn == set(data["runs"][0]["curves"]) - {"entropy/initial", "entropy/target"}
    (interval,) = [each for each in series if each["label"] == "pass@1"]
    assert (interval["low"], interval["high"]) == ("eval/math500/pass@1_low", "eval/math500/pass@1_high")
    (levels,) = [chart["lines"] for section in data["sections"] for chart in section["charts"] if "lines" in chart]
    assert [line["name"] for line in levels] == ["entropy/target", "entropy/initial"]


def test_a_metric_of_another_version_is_drawn_without_a_unit() -> None:
    (section,) = chart_sections({"eval/pass@1"})
    assert section["charts"] == [
        {"title": "eval/pass@1", "unit": "", "series": [{"name": "eval/pass@1", "label": "pass@1"}]}
    ]


def test_a_page_that_would_be_too_large_keeps_the_extremes_of_each_stretch(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    values = np.random.default_rng(0).random(3000)
    values[1234], values[2345] = 50.0, -50.0
    for step, value in enumerate(values):
        writer.write({"step": step, "reward/mean": value, **{f"user/n{i}": value for i in range(600)}} if step < 3 else
                     {"step": step, "reward/mean": value})  # fmt: skip
    writer.close()
    (run,) = page_data([tmp_path])["runs"]
    curve = run["curves"]["reward/mean"]
    assert run["thinned"] and len(curve["steps"]) <= 200
    assert all(values[step] == value for step, value in zip(curve["steps"], curve["values"], strict=True))
    assert {1234, 2345} <= set(curve["steps"])
    assert thinned(np.array([3.0, 1.0, 2.0]), 3) == [0, 1, 2]
    assert thinned(np.array([3.0, 1.0, 2.0, 2.0, 9.0, 0.0]), 4) == [0, 1, 4, 5]


def test_what_a_run_recorded_cannot_leave_the_data_block(tmp_path: Path) -> None:
    run = page_run(tmp_path, 8, name=HOSTILE)
    write_samples(run, [sample_row(3, HOSTILE, reward=1.0, reason=HOSTILE)])
    text = page([run])
    found = Page(text)
    # the last script of ours is the last thing of the page: no element and no comment came from the run
    assert [tag for tag, _ in found.tags if tag == "script"] == ["script"] * 4
    assert "img" not in {tag for tag, _ in found.tags} and found.comments == []
    assert not set(found.block) & set("<>&\u2028\u2029\u202e\x1b") and found.block.isascii()
    assert found.data["runs"][0]["label"] == HOSTILE  # and is still what it was
    (row,) = found.data["runs"][0]["samples"]["rows"]
    assert "".join(row["tokens"]) == HOSTILE
    assert json.loads(embedded("</script>\u2028&")) == "</script>\u2028&"


def test_the_page_loads_nothing_and_its_policy_admits_its_own_scripts_alone(tmp_path: Path) -> None:
    found = Page(page([page_run(tmp_path, 2)]))
    for tag, attributes in found.tags:
        assert "src" not in attributes and not {name for name in attributes if name.startswith("on")}, tag
        assert tag not in {"link", "iframe", "object", "base"}
    (policy,) = [entry["content"] for _, entry in found.tags if entry.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    assert directives["default-src"] == "'none'"
    assert len(re.findall(r"'sha256-[\w+/]+='", directives["script-src"])) == 3
    assert "unsafe" not in str(policy)


def test_seeds_of_one_configuration_are_one_group(tmp_path: Path) -> None:
    first = page_run(tmp_path / "a", 4)
    seed = page_run(tmp_path / "b", 4, seed=1, name="other")
    changed = page_run(tmp_path / "c", 4, lr=2e-4)
    runs = page_data([first, seed, changed])["runs"]
    assert [run["group"] for run in runs] == [0, 0, 1]
    assert [run["label"] for run in runs] == ["demo (a)", "other", "demo (c)"]
    assert [run["config"]["optimizer.lr"] for run in runs] == ["0.0001", "0.0001", "0.0002"]
    assert runs[0]["versions"] == {"torch": "2.9"}


def test_entropy_by_position_and_the_ledger_are_drawn_from_what_the_run_kept(tmp_path: Path) -> None:
    run = page_run(tmp_path, 6)
    with FlightWriter(run) as writer:
        for record in flight_records(Aer(), 6):
            writer.write(record)
    ledger = DifficultyLedger(1.0, 4)
    attempts = np.full(3, 4)
    ledger.update(np.arange(3, dtype=np.uint64), attempts, np.array([0, 2, 4]), np.full(3, 2.0), attempts, step=5)
    (run / "checkpoints" / "step_00000006").mkdir(parents=True)
    ledger.save(str(run / "checkpoints" / "step_00000006" / "ledger"))
    (shown,) = page_data([run])["runs"]
    assert shown["notes"] == []
    positions = shown["positions"]
    assert positions["rows"][:3] == ["0", "1-2", "3-6"] and positions["columns"] == [str(step) for step in range(6)]
    assert all(value is None or value > 0 for row in positions["values"] for value in row)
    assert (shown["ledger"]["prompts"], shown["ledger"]["source"]) == (3, "step_00000006")
    # posterior means (1 + 0) / 6, (1 + 2) / 6 and 5 / 6: difficulty 5/6, 1/2 and 1/6, all at 0.5 nats
    (row,) = shown["ledger"]["values"]
    assert row == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert shown["ledger"]["quantiles"]["0.5"] == pytest.approx(0.5)


def test_a_damaged_part_leaves_the_others_and_is_named(tmp_path: Path) -> None:
    run = page_run(tmp_path, 3)
    (run / "flight.jsonl").write_text('{"step": 0, "format": 99}\n{"step": 1}\n')
    (run / "samples").mkdir()
    (run / "samples" / "a.parquet").write_bytes(b"PAR1 no")
    (shown,) = page_data([run])["runs"]
    assert shown["positions"] is None and shown["samples"] is None
    assert len(shown["notes"]) == 2 and "a.parquet is no Parquet of samples" in shown["notes"][1]


def test_samples_are_bounded_and_the_best_worst_uncertain_and_each_reason_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "KEPT_OF_A_KIND", 2)
    rows = reward_hack(30)
    rows[10] = sample_row(3, "flat", reward=0.5, reason="rare") | {"token_entropy": [9.0] * 4}
    write_samples(tmp_path, rows[:50], "a.parquet")
    write_samples(tmp_path, rows[50:], "b.parquet")
    shown = page_samples(tmp_path)
    assert shown["total"] == len(rows)
    assert shown["reasons"]["rare"] == 1 and sum(shown["reasons"].values()) == len(rows)
    assert {row["reason"] for row in shown["rows"]} == {"correct", "wrong", "no_answer", "rare", "solved"}
    assert len(shown["rows"]) <= 2 * 8
    (rare,) = [row for row in shown["rows"] if row["reason"] == "rare"]
    assert rare["mean_entropy"] == 9.0 and rare["tokens"] == list("flat")


def test_long_texts_are_cut_in_the_middle_and_unsampled_tokens_have_no_entropy(tmp_path: Path) -> None:
    row = sample_row(0, "ab" * 5000, reward=0.0, reason="wrong")
    tools = sample_row(1, "abcd", reward=0.0, reason="wrong")
    tools |= {"sampled": [True, False, False, True], "token_entropy": [0.5, 1.5]}
    write_samples(tmp_path, [row, tools])
    second, first = page_samples(tmp_path)["rows"]
    assert second["entropy"] == [0.5, None, None, 1.5]
    assert len(first["tokens"]) == 2 * samples_module.MAX_TOKENS + 1
    assert first["tokens"][samples_module.MAX_TOKENS] == " [... 8800 tokens ...] "


@pytest.mark.parametrize(
    ("text", "box"),
    [(r"so \boxed{42}", "42"), (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} \boxed{}", ""), ("42", None),
     (r"\boxed{4", "4")],
)  # fmt: skip
def test_the_last_box_is_found(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


def test_a_table_that_is_no_samples_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    pq.write_table(pa.table({"step": ["a"], "reward": [1.0]}), tmp_path / "samples" / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet is no Parquet of samples \(its column step must hold integers"):
        page_samples(tmp_path)


def test_the_command_writes_the_page_of_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [page_run(tmp_path / name, 3, name=name) for name in ("a", "b")]
    assert main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out == f"{runs[0] / 'report.html'}\n"
    assert [run["label"] for run in Page((runs[0] / "report.html").read_text()).data["runs"]] == ["a", "b"]
    assert write_html(runs, tmp_path / "x.html").stat().st_size < 3_000_000


@contextmanager
def serving(*runs: Path) -> Iterator[ReportServer]:
    with ReportServer(runs, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_server_follows_the_run_and_gives_nothing_else(tmp_path: Path) -> None:
    run = page_run(tmp_path, 3)
    with serving(run) as server:
        assert server.address.startswith("http://127.0.0.1:")
        status, text = ask(server.address)
        assert status == 200 and len(Page(text).data["runs"][0]["steps"]) == 3
        state = ask(f"{server.address}state")
        assert state == ask(f"{server.address}state")
        writer = MetricsWriter(run)
        writer.write({"step": 3, "reward/mean": 0.5})
        writer.close()
        assert ask(f"{server.address}state") != state
        assert len(Page(ask(server.address)[1]).data["runs"][0]["steps"]) == 4
        for path in ("metrics.jsonl", "..%2f..%2fetc/passwd", "report.html", "?x", "run.json"):
            assert ask(f"{server.address}{path}")[0] == 404, path
        assert ask(server.address, Host="evil.example:80")[0] == 403
