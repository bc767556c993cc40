"""The commands in README and docs: each names what exists, with options that parse; cheap ones are run.

A command is a line of a console, bash or indented block, or an inline code span, that begins with aer, python, make,
bash or pytest. Words in capitals stand for the reader's own: RUN.toml is the quick start here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from aer_megatron import cli
from aer_megatron.config_loading import load_config
from aer_megatron.console.command_line import CommandLine
from tests.support.runs import MODEL, ROOT

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/README.md", "benchmarks/results/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it names what was
)
STAND_IN = ROOT / "examples" / "quickstart" / "countdown.toml"
OWN_RUN_PAGE = ROOT / "docs" / "how-to" / "train-your-own.md"
PROGRAMS = ("aer", "python", "make", "bash", "pytest", "torchrun")
PASSED_ON = ("--mem-fraction-static",)  # serve.sh hands what follows the model to SGLang
SHELL_BLOCKS = ("console", "bash", "sh")
AER_COMMANDS = {name: module for group in cli.COMMANDS.values() for name, (module, _) in group.items()}
MAKE_TARGETS = set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a page. Example: ``Command(Path("README.md"), 12, ("make", "test"))``."""

    page: Path
    line: int
    words: tuple[str, ...]
    python_path: str | None = None  # a folder that PYTHONPATH=... in front of it names

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {shlex.join(self.words)}"


def shell_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line number, text) of shell blocks and of inline code; a line that ends in a backslash goes on."""
    block: str | None = None  # the language of the fenced block
    started: tuple[int, str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            block = line.strip().removeprefix("```").split(" ")[0] if block is None else None
        elif block in SHELL_BLOCKS or (block is None and line.startswith("    ")):
            first, so_far = started or (number, "")
            if line.endswith("\\"):
                started = (first, so_far + line.removesuffix("\\").strip() + " ")
            else:
                started = None
                yield first, so_far + line.strip()
        elif block is None:
            yield from ((number, code) for code in re.findall(r"`([^`]+)`", line))


def commands(page: Path, text: str) -> Iterator[Command]:
    """Yields the commands of a page; optional parts in brackets count, what stands for anything does not."""
    for number, line in shell_lines(text):
        line = re.sub(r"(^|\s)#\s.*|^\$ ", " ", line)
        for part in re.split(r"\s(?:&&|\|\||\||;)\s", line):
            part = re.sub(r"(^|\s)\[([^\]]*)\]", r"\1 \2 ", part)
            try:
                words = shlex.split(part)
            except ValueError:  # prose, or output with an apostrophe
                continue
            variables = {}
            while words and re.match(r"[A-Z_]+=", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables[name] = value
            words = [word for word in words if word != "..." and not word.startswith("--section.key")]
            program = words[0].removeprefix(".venv/bin/") if words else ""
            if len(words) > 1 and program in PROGRAMS and re.match(r"[\w./-]", words[1]):
                yield Command(page, number, (program, *words[1:]), variables.get("PYTHONPATH"))


ALL = [command for page in PAGES for command in commands(page, page.read_text(encoding="utf-8"))]


@cache
def help_of(*words: str) -> str:
    """Returns the help of a command, printed in this process: ``("aer", "plan")``, ``("tools/x.py",)``."""
    printed = io.StringIO()
    arguments, places = sys.argv, list(sys.path)
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        try:
            if words[0] == "aer":
                cli.main([*words[1:], "--help"])
            else:
                sys.argv, sys.path[:0] = [words[0], "--help"], [str(ROOT / "tools")]  # as python puts a script's
                if words[0].endswith(".py"):
                    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
                else:
                    runpy.run_module(words[0], run_name="__main__")
        finally:
            sys.argv, sys.path[:] = arguments, places
    return printed.getvalue()


def faults(command: Command, own_run: Path) -> Iterator[str]:
    """Yields what is wrong with a command, in words."""
    if command.python_path is None:
        yield from _faults(command.words, own_run)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / command.python_path)
        yield from list(_faults(command.words, own_run))


def _faults(words: Sequence[str], own_run: Path) -> Iterator[str]:
    program, *rest = words
    yield from (f"{word} does not exist" for word in rest if _is_missing(word))
    if program == "make":
        yield from (f"make {word} is no target" for word in rest if "=" not in word and word not in MAKE_TARGETS)
    elif program == "aer":
        yield from _faults_of_aer(rest, own_run)
    elif program in ("python", "torchrun") and "-m" in rest:
        place = rest.index("-m")
        yield from _faults_of_module(rest[place + 1 :], own_run)
    elif program == "python" and rest[0].startswith("benchmarks/"):  # they import tests/support from the root
        yield f"{rest[0]} is run as a module: python -m {rest[0].removesuffix('.py').replace('/', '.')}"
    elif program == "python" and rest[0].endswith(".py"):
        yield from _faults_of_options(rest[1:], (rest[0],))
    elif program == "bash":
        script = (ROOT / rest[0]).read_text(encoding="utf-8") if (ROOT / rest[0]).is_file() else ""
        named = [word.partition("=")[0] for word in rest[1:] if _is_option(word)]
        yield from (f"{rest[0]} has no {name}" for name in named if name not in script and name not in PASSED_ON)
        yield from _faults_of_overrides(rest[1:], own_run)


def _faults_of_aer(words: Sequence[str], own_run: Path) -> Iterator[str]:
    """Checks ``aer NAME ...`` with the command's own parser."""
    name, *arguments = words
    if name in ("--help", "COMMAND") or "--help" in arguments:
        return
    if name not in AER_COMMANDS:
        yield f"aer {name} is no command"
        return
    if not arguments:  # the command is only named
        return
    line = getattr(importlib.import_module(AER_COMMANDS[name]), "COMMAND", None)
    if not isinstance(line, CommandLine):  # it has commands of its own
        below = arguments[:1] if re.fullmatch(r"[a-z][a-z0-9-]+", arguments[0]) else []
        yield from _faults_of_options(arguments, ("aer", name, *below))
        return
    try:
        given = line.parse([_filled(word) for word in arguments])
        if line.is_launcher:
            yield from _faults_of_program(given.places, own_run)
        elif given.overrides or given.place.endswith(".toml"):
            load_config(_run_file(given.place, own_run), given.overrides)
    except ValueError as error:
        yield str(error)


def _faults_of_program(words: Sequence[str], own_run: Path) -> Iterator[str]:
    """Checks what every rank of a launch runs."""
    if words[0] == "-m":
        yield from _faults_of_module(words[1:], own_run)
    elif not words[0].endswith(".py"):
        yield from _faults_of_aer(words if words[0] in AER_COMMANDS else ("train", *words), own_run)


def _faults_of_module(words: Sequence[str], own_run: Path) -> Iterator[str]:
    module, *arguments = words or ["MODULE"]
    if module in ("pytest", "venv") or module.isupper():
        return
    if module == "aer_megatron.train":
        yield from _faults_of_aer(("train", *arguments), own_run)
        return
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    yield from _faults_of_options(arguments, (module,)) if found else [f"there is no module {module}"]


def _faults_of_options(arguments: Sequence[str], words: tuple[str, ...]) -> Iterator[str]:
    """Looks for the options of ``arguments`` in the help of a program that has no ``CommandLine``."""
    given = [argument.partition("=")[0] for argument in arguments if _is_option(argument)]
    known = help_of(*words) if given and not _is_missing(words[0]) else ""
    for name in given:
        if not re.search(rf"{re.escape(name)}(?![a-z-])", known):
            yield f"{' '.join(words)} has no {name}"


def _faults_of_overrides(arguments: Sequence[str], own_run: Path) -> Iterator[str]:
    overrides = [word for word in arguments if word.startswith("--") and "." in word.partition("=")[0]]
    run_file = next((word for word in arguments if word.endswith(".toml")), "RUN.toml")
    try:
        load_config(_run_file(run_file, own_run), overrides)
    except ValueError as error:
        yield str(error)


def _run_file(name: str, own_run: Path) -> Path:
    if name == own_run.name:
        return own_run
    return ROOT / name if (ROOT / name).is_file() else STAND_IN


def _is_option(word: str) -> bool:
    return bool(re.match(r"--[a-z]", word)) and "." not in word.partition("=")[0]


def _filled(word: str) -> str:
    return "1" if word in ("N", "K", "S") else word.replace("|never|always", "")


def _is_missing(word: str) -> bool:
    """Returns whether a word names a file of the repository that is not there."""
    if not re.fullmatch(r"(tests|tools|examples|benchmarks|docs|aer_megatron|cpp)/[\w./-]+", word):
        return False
    return not (ROOT / word).exists()


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file that train-your-own.md writes down."""
    [block] = re.findall(r"```toml\n(.*?)```", OWN_RUN_PAGE.read_text(encoding="utf-8"), flags=re.S)
    path = tmp_path_factory.mktemp("own") / "my_run.toml"
    path.write_text(block, encoding="utf-8")
    return path


def test_the_pages_have_commands() -> None:
    assert len(ALL) > 100
    assert {"aer", "python", "make", "bash"} <= {command.words[0] for command in ALL}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_what_exists(page: Path, own_run: Path) -> None:
    found = [f"{command}: {fault}" for command in ALL if command.page == page for fault in faults(command, own_run)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("    make quikstart", "make quikstart is no target"),
        ("    aer trian RUN.toml", "aer trian is no command"),
        ("    aer train RUN.toml --dryrun", "--dryrun is no option of aer train"),
        ("    aer train RUN.toml --algo.entropy.tua=0.5", "did you mean"),
        ("    aer launch --nprocs 2 RUN.toml", "did you mean --nproc"),
        ("    aer launch --nproc 2 RUN.toml --parallel.cp=0", "parallel.cp"),
        ("    aer launch --nproc 2 doctor RUN.toml --refrence=never", "did you mean --reference"),
        ("    aer launch --nproc 2 -m aer_megatron.docter RUN.toml", "there is no module aer_megatron.docter"),
        ("    python tools/fetch_smollm3.py", "does not exist"),
        ("    python tools/check_roundtrip.py MODEL --layout 1x1", "has no --layout"),
        ("    python benchmarks/bench_ledger.py", "python -m benchmarks.bench_ledger"),
        ("    bash tools/gpu_acceptance.sh --dryrun", "has no --dryrun"),
        ("    pytest tests/nowhere/test_nothing.py", "does not exist"),
        ("```console\n$ aer plan RUN.toml --gpsu 8\n```", "did you mean --gpu"),
        ("Say `aer reprot RUN`.", "aer reprot is no command"),
    ],
)
def test_a_wrong_command_is_found(line: str, words: str, own_run: Path) -> None:
    [command] = commands(ROOT / "README.md", line)
    assert any(words in fault for fault in faults(command, own_run))


def test_the_plans_of_the_pages_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    plans = [command.words for command in ALL if re.match(r"aer plan examples/", shlex.join(command.words))]
    assert plans
    for _, *rest in plans:
        assert cli.main(rest) == 0, rest
        assert "memory per GPU" in capsys.readouterr().out


def test_a_dry_run_of_the_readers_own_run(own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"problem": "1,1=2>", "answer": "1+1"}\n', encoding="utf-8")
    shutil.copytree(MODEL, tmp_path / "model")
    shape = AutoConfig.from_pretrained(MODEL)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "model")
    code = cli.main([
        "train", str(own_run), "--dry-run", f"--model.path={tmp_path}/model",
        f"--data.train.path={tmp_path}/train.jsonl", f"--eval.sets.held_out.source.path={tmp_path}/eval.jsonl",
        "--data.template=plain", "--data.instruction={problem}", "--data.max_prompt_tokens=16",
        "--rollout.max_new_tokens=16", f"--run.output_dir={tmp_path}/run",
        "--parallel.tp=1", "--parallel.sequence_parallel=false",
    ])  # fmt: skip
    assert code == 0, capsys.readouterr()


@pytest.mark.processes
def test_the_installed_command_prints_its_help() -> None:
    program = Path(sys.executable).with_name("aer")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout for name in AER_COMMANDS)
