"""What a command of ``aer`` takes, its help, and its arguments as one frozen record.

    COMMAND = CommandLine(
        "doctor", run=_run, about="Examines a run before it starts.", place="RUN.toml", what="the run file",
        options=(Option("reference", "MODE", "ask transformers", choices=("auto", "never"), default="auto"),),
    )
    main = COMMAND.main

Every command has its options as ``--name VALUE`` or ``--name=VALUE``, takes options of the run file as
``--section.key=value`` where ``overrides`` says so, and ends as ``run_command`` says.
"""

from __future__ import annotations

import difflib
import functools
import logging
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from aer_megatron.config_section import describe
from aer_megatron.config_values import shown
from aer_megatron.console.failures import Edge, run_command
from aer_megatron.console.standard_streams import say

_HELP = ("--help", "-h")
_WIDTH = 118


def whole(least: int = 0) -> Callable[[str], int]:
    """Returns the reader of a whole number from ``least``, of at most 7 digits."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 8):
            raise ValueError("must be a whole number")
        if int(text) < least:
            raise ValueError(f"must be at least {least}")
        return int(text)

    return read


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command's own. Example: ``Option("steps", "K", "steps before the checkpoint", whole(1), 2)``.

    ``read`` makes the value of the text, or raises ValueError with the rule ("must be at least 1").
    """

    name: str
    metavar: str  # empty: a switch, which is False without it
    help: str  # empty: not in the help
    read: Callable[[str], Any] = str
    default: Any = None
    choices: tuple[str, ...] = ()
    required: bool = False
    repeated: bool = False  # its value is the tuple of all that were given
    several: bool = False  # takes all words up to the next option, or one with commas; its value is their tuple
    aliases: tuple[str, ...] = ()

    def value(self, text: str) -> Any:
        """Returns the value of ``text``; raises ValueError that names the option, the text and the rule."""
        if self.choices and text not in self.choices:
            raise ValueError(f"--{self.name}={text} is not known; use {' or '.join(self.choices)}")
        try:
            return self.read(text)
        except ValueError as error:
            raise ValueError(f"--{self.name}={text} {error}") from None


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gave. Example: ``Given(("run.toml",), {"stage": "rl"}, ("--run.seed=1",))``."""

    places: tuple[str, ...]  # run files, folders; of a launch all that its ranks are given
    options: Mapping[str, Any]  # every option of the command, with its default
    overrides: tuple[str, ...]
    arguments: tuple[str, ...] = ()  # as they were given

    def __getitem__(self, name: str) -> Any:
        return self.options[name]

    @property
    def place(self) -> str:
        return self.places[0]

    def config(self, *, speaks: bool = True) -> Config:
        """Returns the configuration of the run file under the overrides; raises ValueError as ``load_config``.

        ``speaks`` says on standard error which options of the file an override leaves out.
        """
        note = functools.partial(say, error=True) if speaks else None
        return load_config(self.places[0] if self.places else None, self.overrides, note=note)


@dataclass(frozen=True, slots=True)
class CommandLine:
    """One command of ``aer``. ``place`` and ``what`` name what it works on: RUN.toml, "the run file".

    A place of several words is so many arguments, those in brackets may be left out: MODEL [OUTPUT].
    """

    name: str
    about: str
    run: Callable[[Given, Edge], int]
    place: str
    what: str
    options: tuple[Option, ...] = ()
    overrides: bool = True
    needs_place: bool = True
    several_places: bool = False
    under_launch: bool = False  # it may run on several ranks
    is_launcher: bool = False  # what follows its options belongs to the program that it starts
    hints: Mapping[str, str] = field(default_factory=dict)  # beginnings of options that it lacks -> what to do
    more_help: Callable[[], str] = str

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the command, and returns its exit code: see ``run_command``."""
        given = list(sys.argv[1:] if arguments is None else arguments)
        asked = not given or any(argument in _HELP for argument in (given[:1] if self.is_launcher else given))

        def body(edge: Edge) -> int:
            if asked:
                say(self.help())
                return 0
            quiet_libraries()
            return self.run(self.parse(given), edge)

        return run_command(body, is_launcher=self.is_launcher)

    def help(self) -> str:
        """Returns usage, meaning and options."""
        tail = " [--section.key=value ...]" if self.overrides else ""
        needed = "".join(f" --{each.name} {each.metavar}" for each in self.options if each.required)
        more = " ..." if self.several_places else ""
        usage = [f"usage: aer {self.name} {self.place}{more}{needed} [options]{tail}"]
        if self.is_launcher:
            usage = [f"usage: aer {self.name} [options] {self.place}"]
        if self.under_launch:
            usage.append(f"       aer launch --nproc N {self.name} {self.place} ...")
        rows = [(self.place, self.what)]
        for each in self.options:
            if each.help:
                default = f" [{each.default}]" if isinstance(each.default, str | int | float) and each.default else ""
                choices = f"{' or '.join(each.choices)}: " if each.choices else ""
                rows.append((f"--{each.name} {each.metavar}".strip(), f"{choices}{each.help}{default}"))
        if self.overrides:
            rows.append(("--section.key=value", "an option of the run file; aer train --help lists them"))
        width = max(len(name) for name, _ in rows) + 4
        fill = {"width": _WIDTH, "subsequent_indent": " " * width}
        lines = [textwrap.fill(f"{'  ' + name:{width}}{text}", **fill) for name, text in rows]  # type: ignore[arg-type]
        return "\n".join([*usage, "", textwrap.fill(self.about, _WIDTH), "", *lines, *filter(None, [self.more_help()])])

    def parse(self, arguments: Sequence[str]) -> Given:
        """Returns what the arguments say; raises ValueError for one that is not understood, missing or wrong."""
        spellings = {name: each for each in self.options for name in (each.name, *each.aliases)}
        values: dict[str, Any] = {each.name: each.default if each.metavar else False for each in self.options}
        values |= {each.name: () for each in self.options if each.repeated or each.several}
        places, overrides, rest = [], [], list(arguments)
        while rest:
            argument = rest.pop(0)
            flag, separator, text = argument.partition("=")
            option = spellings.get(flag.removeprefix("--").replace("_", "-")) if flag.startswith("--") else None
            if option is not None and not option.metavar:
                if separator:
                    raise ValueError(f"{argument} has a value, and {flag} takes none; write {flag}")
                values[option.name] = True
            elif option is not None:
                if not separator and not rest:
                    raise ValueError(f"{flag} needs a value; see aer {self.name} --help")
                words = [text if separator else rest.pop(0)]
                while option.several and not separator and rest and not rest[0].startswith("--"):
                    words.append(rest.pop(0))
                if option.several:
                    values[option.name] += tuple(map(option.value, filter(None, ",".join(words).split(","))))
                    continue
                value = option.value(words[0])
                values[option.name] = (*values[option.name], value) if option.repeated else value
            elif flag.startswith("--"):
                overrides.append(self._override(argument, rest[0] if rest else "--"))
            elif self.is_launcher:
                places, rest = [argument, *rest], []
            else:
                self._check_place(argument, places)
                places.append(argument)
        wanted = [word for word in self.place.split() if not word.startswith("[")]
        if self.needs_place and len(places) < len(wanted):
            absent = wanted[len(places)] if places else self.what.partition(",")[0]
            raise ValueError(f"{absent} is missing; see aer {self.name} --help")
        missing = next((each for each in self.options if each.required and values[each.name] is None), None)
        if missing is not None:
            raise ValueError(f"--{missing.name} is missing: {missing.help}; give --{missing.name} {missing.metavar}")
        return Given(tuple(places), values, tuple(overrides), tuple(arguments))

    def _override(self, argument: str, following: str) -> str:
        """Returns the argument if it is an override; raises ValueError with what it should be."""
        flag, separator, _ = argument.partition("=")
        names = [name for each in self.options for name in (each.name, *each.aliases) if each.help]
        near = difflib.get_close_matches(flag[2:].replace("_", "-"), names, n=1, cutoff=0.7)
        if not near and self.overrides:
            near = [key for key, *_ in describe(Config) if key.rsplit(".", 1)[-1] == flag[2:]]
        is_option = "." in flag or flag[2:] in Config.model_fields
        if not self.overrides or not is_option:
            hint = f"did you mean --{near[0]}?" if near else f"see aer {self.name} --help"
            if is_option and self.is_launcher:
                hint = "options of the run come after the run file"
            hint = next((text for start, text in self.hints.items() if flag.startswith(start)), hint)
            raise ValueError(f"{flag} is no option of aer {self.name}; {hint}")
        if not separator:
            value = "VALUE" if following.startswith("--") else following
            raise ValueError(
                f"{shown(argument)} and its value must be one argument: write {shlex.quote(f'{argument}={value}')}"
            )
        return argument

    def _check_place(self, argument: str, places: Sequence[str]) -> None:
        name, separator, _ = argument.partition("=")
        if self.overrides and separator and name.lstrip("-").split(".")[0] in Config.model_fields:
            raise ValueError(f"{shown(argument)} is not understood: write {shlex.quote('--' + argument.lstrip('-'))}")
        if argument.startswith("-"):
            raise ValueError(f"argument {argument!r} is not understood; see aer {self.name} --help")
        if len(places) >= len(self.place.split()) and not self.several_places:
            what = self.what.partition(",")[0]
            raise ValueError(f"argument {argument!r} is not understood: {what} is already {' '.join(places)}")


def run_file_options(prefix: str = "") -> str:
    """Returns the help of the run file's options that begin so: name, default and meaning."""
    lines = ["\noptions of the run file (defaults in brackets):"]
    for key, _, default, description in describe(Config):
        if key.startswith(prefix):
            lines.append(f"  --{key} [{default}]" + (f"\n        {description}" if description else ""))
    return "\n".join(lines)


def quiet_libraries() -> None:
    """Megatron-Core and torch warn about every optional package that is absent; run.json lists the versions."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
    # Megatron reads .grad of the views that it keeps as gradient accumulators
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch)\..*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(megatron|torch)\..*")
    for name in ("megatron", "torch.distributed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
