"""The command lines of all commands: their help, what they refuse, and what an argument becomes."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from aer_megatron import cli
from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from tests.support.runs import ROOT

MODULES = {name: module for group in cli.COMMANDS.values() for name, (module, _) in group.items()}
PLAIN = CommandLine(
    "demo",
    about="Shows.",
    run=lambda given, edge: 0,
    place="RUN.toml",
    what="the run file, of any run",
    options=(
        Option("steps", "K", "how many", whole(1), 2),
        Option("mode", "MODE", "how", choices=("fast", "slow"), default="fast"),
        Option("to", "LAYOUT", "where", repeated=True),
        Option("gpus", "N", "GPUs", whole(1), required=True, aliases=("devices",)),
        Option("keep-all", "", "keep"),
    ),
)


def test_an_option_of_several_words_ends_at_the_next_option() -> None:
    several = CommandLine(
        "demo", "Shows.", lambda given, edge: 0, "A", "it", (Option("n", "N ...", "", whole(), several=True),)
    )
    assert several.parse(["a", "--n", "1", "2", "--run.seed=1", "--n=3,4"])["n"] == (1, 2, 3, 4)
    assert several.parse(["a"])["n"] == ()
    with pytest.raises(ValueError, match="--n=x must be a whole number"):
        several.parse(["a", "--n", "1", "x"])


def test_what_is_given_and_what_is_not() -> None:
    given = PLAIN.parse(
        ["a.toml", "--devices=4", "--steps", "3", "--to", "x", "--to=y=1", "--keep_all", "--run.seed=1"]
    )
    options = {"steps": 3, "mode": "fast", "to": ("x", "y=1"), "gpus": 4, "keep-all": True}
    assert (given.places, given.options, given.overrides) == (("a.toml",), options, ("--run.seed=1",))
    assert PLAIN.parse(["a.toml", "--gpus=1"])["keep-all"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus=1"], "the run file is missing; see aer demo --help"),
        (["a.toml"], "--gpus is missing: GPUs; give --gpus N"),
        (["a.toml", "b.toml"], "argument 'b.toml' is not understood: the run file is already a.toml"),
        (["a.toml", "--steps"], "--steps needs a value; see aer demo --help"),
        (["a.toml", "--steps=0"], "--steps=0 must be at least 1"),
        (["a.toml", "--steps", "x"], "--steps=x must be a whole number"),
        (["a.toml", "--mode=fats"], "--mode=fats is not known; use fast or slow"),
        (["a.toml", "--keep-all=1"], "--keep-all=1 has a value, and --keep-all takes none; write --keep-all"),
        (["a.toml", "--step=3"], "--step is no option of aer demo; did you mean --steps?"),
        (["a.toml", "--tau=0.5"], "--tau is no option of aer demo; did you mean --algo.entropy.tau?"),
        (["a.toml", "--zzz=1"], "--zzz is no option of aer demo; see aer demo --help"),
        (["a.toml", "--run.seed", "3"], "'--run.seed' and its value must be one argument: write --run.seed=3"),
        (["a.toml", "run.seed=3"], "'run.seed=3' is not understood: write --run.seed=3"),
        (["a.toml", "-x"], "argument '-x' is not understood; see aer demo --help"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        PLAIN.parse(arguments)
    assert str(refused.value) == message


def test_a_launcher_leaves_what_follows_to_its_program() -> None:
    launcher = CommandLine(
        "go",
        about="Goes.",
        run=lambda given, edge: 0,
        place="PROGRAM",
        what="the program",
        overrides=False,
        is_launcher=True,
        options=(Option("nproc", "N", "ranks"),),
    )
    assert launcher.parse(["--nproc=2", "x.toml", "--nproc", "9"]).places == ("x.toml", "--nproc", "9")


@pytest.mark.processes
@pytest.mark.parametrize("name", MODULES)
def test_every_command_has_a_help_that_costs_no_torch(name: str) -> None:
    call = f"code = cli.main([{name!r}, '--help'])"
    program = f"import sys; from aer_megatron import cli; {call}; sys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: aer {name} ") and not done.stderr
    assert max(map(len, done.stdout.splitlines()[:12])) <= 120


@pytest.mark.parametrize("name", MODULES)
def test_every_command_refuses_an_option_that_it_lacks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command: CommandLine = importlib.import_module(MODULES[name]).COMMAND
    wanted = command.options[0].name
    assert cli.main([name, f"--{wanted[:-1]}{wanted[-1]}x=1", "place"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"aer_megatron: --{wanted}x is no option of aer {name}; did you mean --{wanted}?\n"


def test_the_whole_help_fits_a_screen() -> None:
    lines = cli.help_text().splitlines()
    assert len(lines) <= 23 and max(map(len, lines)) <= 80  # and the prompt
    for name in MODULES:
        assert any(line.startswith(f"  {name} ") for line in lines)


def test_a_record_needs_no_options() -> None:
    assert Given((), {}, ()).places == ()


def test_a_command_of_several_places_takes_so_many() -> None:
    copy = CommandLine(
        "copy", "Copies.", lambda given, edge: 0, "MODEL OUTPUT [LOG]", "the model folder, and the new one"
    )
    assert copy.parse(["a", "b"]).places == ("a", "b")
    assert copy.parse(["a", "b", "c"]).places == ("a", "b", "c")
    for arguments, message in (
        ([], "the model folder is missing; see aer copy --help"),
        (["a"], "OUTPUT is missing; see aer copy --help"),
        (["a", "b", "c", "d"], "argument 'd' is not understood: the model folder is already a b c"),
    ):
        with pytest.raises(ValueError) as refused:
            copy.parse(arguments)
        assert str(refused.value) == message


@pytest.mark.processes
def test_a_help_that_nobody_reads_to_its_end_is_no_error() -> None:
    """``aer train --help | head -1``: the reader is gone before the text is."""
    command = [sys.executable, "-m", "aer_megatron.cli", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")
