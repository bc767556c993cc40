"""Results as a table: for a terminal, in Markdown or in LaTeX."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aer_megatron.evaluate.comparison import Change, Difference
from aer_megatron.evaluate.result import Measure, Result, sum_up

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}
_MAX_PROBLEM_CHARS = 60
_WIDTH = 200  # where the output is no terminal
Row = Sequence[str]


def result_rows(result: Result) -> tuple[Row, list[Row]]:
    """Returns (head, rows) of a result: a row for every set and temperature."""
    answers = [(name, each, sum_up(each)) for name, found in result.sets.items() for each in found.answers]
    ks = [key for _, _, measures in answers for key in measures if "@" in key and not key.startswith("avg@")]
    columns = sorted(dict.fromkeys(ks), key=lambda key: (key.startswith("maj"), int(key.partition("@")[2])))
    head = ("set", "T", "problems", "n", *columns, "reward", "tokens", "cut")
    rows: list[Row] = []
    for name, each, measures in answers:
        counts = (name, f"{each.temperature:g}", str(len(each.problems)), str(each.num_samples))
        reward, length = measures[f"avg@{each.num_samples}"].value, measures["response_length_mean"].value
        cut = measures["truncated"].value
        shown = [_measure(measures.get(column)) for column in columns]
        rows.append((*counts, *shown, f"{reward:.3f}", f"{length:.0f}", f"{100 * cut:.0f} %"))
    return head, rows


def difference_rows(differences: Sequence[Difference]) -> tuple[Row, list[Row]]:
    """Returns (head, rows) of a comparison: a row for every set, temperature and measure."""
    head = ("set", "T", "measure", "A", "B", "B - A", "95 % interval", "p")
    rows: list[Row] = [
        (
            each.name,
            f"{each.temperature:g}",
            each.measure,
            f"{each.first:.3f}",
            f"{each.second:.3f}",
            f"{each.value:+.3f}",
            f"[{each.low:+.3f}, {each.high:+.3f}]",
            f"{each.p_value:.2g}",
        )
        for each in differences
    ]
    return head, rows


def change_rows(changes: Sequence[Change]) -> tuple[Row, list[Row]]:
    """Returns (head, rows) of the problems that changed sides."""
    rows: list[Row] = [
        (
            each.name,
            f"{each.temperature:g}",
            each.first.id,
            f"{each.first.correct}/{each.first.samples}",
            f"{each.second.correct}/{each.second.samples}",
            each.first.problem[:_MAX_PROBLEM_CHARS],
        )
        for each in changes
    ]
    return ("set", "T", "problem", "A", "B", "text"), rows


def _measure(measure: Measure | None) -> str:
    if measure is None:
        return ""
    return f"{measure.value:.3f} [{measure.low:.3f}, {measure.high:.3f}]"


def render(head: Row, rows: Sequence[Row], form: str) -> str:
    """Returns the table; ``form`` is "table", "markdown" or "latex". Control characters are shown as dots."""
    cells = [[_inert(cell) for cell in line] for line in (head, *rows)]
    if form == "markdown":
        cells[1:1] = [["---"] * len(head)]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
    if form == "latex":
        top, *rest = [" & ".join(map(_in_latex, line)) + r" \\" for line in cells]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
        return "\n".join([begin, r"\hline", top, r"\hline", *rest, r"\hline", r"\end{tabular}"])
    table = Table(box=None, pad_edge=False)
    for index, cell in enumerate(cells[0]):
        table.add_column(Text(cell), justify="right" if index else "left", overflow="fold")
    for row in cells[1:]:
        table.add_row(*map(Text, row))
    terminal, text = Console(), io.StringIO()
    width = terminal.width if terminal.is_terminal else _WIDTH
    Console(file=text, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _inert(text: str) -> str:
    return "".join(c if c.isprintable() else "·" for c in text)
