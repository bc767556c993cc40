"""README and docs beside the code that they name: links, files, rooms, messages. (Commands: test_commands.py.)"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from aer_megatron.config import Config
from aer_megatron.config_section import describe
from tests.support.runs import ROOT

DOCS = ROOT / "docs"
PACKAGE = ROOT / "aer_megatron"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it names what was
)
ROOMS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\s-]", "", title.lower()).strip().replace(" ", "-").replace("--", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken_links(page))


def missing_files(text: str) -> Iterator[str]:
    """Yields the files of the project that a text names and that are not there; rooms are named without the package."""
    tops = "aer_megatron|tests|tools|benchmarks|examples|docs|cpp|constraints"
    for path in re.findall(rf"(?<![\w/.{{}}-])((?:{tops}|{'|'.join(sorted(ROOMS))})/[\w/.-]*\.\w+)", text):
        is_ours = path.endswith((".py", ".md", ".toml", ".sh", ".sbatch", ".txt", ".cpp", ".hpp"))
        if is_ours and not (ROOT / path).exists() and not (PACKAGE / path).exists():
            yield path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_pages_name_exist(page: Path) -> None:
    assert not list(missing_files(page.read_text(encoding="utf-8")))


def test_a_file_that_is_gone_is_found() -> None:
    assert list(missing_files("See `aer_megatron/loop/gone.py`, `algo/gone.py` and tests/gone/test_x.py.")) == [
        "aer_megatron/loop/gone.py",
        "algo/gone.py",
        "tests/gone/test_x.py",
    ]


def test_pages_that_code_names_exist() -> None:
    folders = ("aer_megatron", "tests", "tools", "benchmarks", "examples", "constraints", "cpp")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")]
    texts = {file: file.read_text(encoding="utf-8") for file in files if file.suffix in (".py", ".sh", ".toml", ".txt")}
    named = {(name_of(file), page) for file, text in texts.items() for page in re.findall(r"\bdocs/[\w/-]+\.md", text)}
    assert len(named) > 10
    assert not [f"{file}: {page}" for file, page in named if not (ROOT / page).is_file()]


def test_every_page_is_in_the_site_and_found_from_the_first_one() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = set(re.findall(r"[\w/.-]+\.md", nav))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    there |= {f"results/{page.name}" for page in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert listed == there
    reached, new = set[Path](), {DOCS / "index.md"}
    while new:
        reached |= new
        links = {
            (page.parent / link.partition("#")[0]).resolve()
            for page in new
            for link in re.findall(r"\]\(([^):\s]+\.md)[^)]*\)", page.read_text(encoding="utf-8"))
        }
        new = links - reached
    assert set(DOCS.rglob("*.md")) <= reached


def test_the_architecture_has_every_room() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    [picture] = [block for block in re.findall(r"```text\n(.*?)```", text, flags=re.S) if block.startswith("  cli")]
    assert set(re.findall(r"\b(\w+)/", picture)) == ROOMS


def test_the_readme_fits_a_screen() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120]


def texts_of_the_program() -> str:
    """Every text of the package, what is filled in left out, and the shell scripts."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.sh")]
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n\n".join(texts)


def test_the_messages_of_troubleshooting_are_the_program_s() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [re.split(r" \| ", line[2:])[0] for line in page.splitlines() if line.startswith("| ")]
    quoted = [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    pieces = [piece.strip() for code in quoted for piece in code.split("...")]
    said = texts_of_the_program()
    assert len(pieces) > 50
    assert not [piece for piece in pieces if len(piece) > 3 and piece not in said]


def test_two_stars_of_a_paragraph_are_no_emphasis() -> None:
    """mkdocs reads ``H* ... H*`` as emphasis, where GitHub does not: one of them is escaped."""
    texts = {page: re.sub(r"`[^`]*`", "", prose(page)) for page in DOCS.rglob("*.md")}
    blocks = [(page, block) for page, text in texts.items() for block in re.split(r"\n\s*\n|\n(?=[|-])", text)]
    assert not [
        f"{name_of(page)}: {block[:80]}"
        for page, block in blocks
        if block[:1] != "|" and len(re.findall(r"H\*", block)) > 1
    ]


def test_options_that_pages_name_exist() -> None:
    known = {name for name, *_ in describe(Config)}
    known |= {name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)}
    free = ("megatron.", "sglang.launch.", "sglang.environment.")  # passed on, and options of procedural sets
    files = (".json", ".lock", ".md", ".py", ".toml", ".png", ".jsonl", ".sh")
    wrong = [
        f"{name_of(page)}: {name}"
        for page in PAGES
        for name in re.findall(r"`(?:--)?([a-z]+(?:\.[a-z_0-9]+)+)(?=[ =`])", page.read_text(encoding="utf-8"))
        if name.partition(".")[0] in Config.model_fields and name not in known
        if not name.startswith(free) and not name.endswith(files) and ".options." not in name
    ]
    assert not wrong
