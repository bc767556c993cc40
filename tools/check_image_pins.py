"""Checks that every apt and pip pin of the Dockerfile and of the constraints it uses exists in the indexes.

    python tools/check_image_pins.py [--offline] [--uv UV]

apt: `apt-cache madison` of a Debian machine of the image's release (run `apt-get update` first). pip: `uv pip compile
--no-deps` (pip install uv), which finds for every pin a wheel that fits the image's Python and C library; it reads
metadata and downloads no wheels. With --offline only the forms are checked: that every package has a pin, and that
pins and constraints agree.

Exit codes: 0 all resolve, 1 some do not (each is named), 2 the Dockerfile cannot be read.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# built from source in the image: no wheel to resolve
SOURCE_ONLY = ("transformer-engine-torch",)
PLATFORM = "x86_64-manylinux_2_36"  # the C library of Debian 12


@dataclass(frozen=True, slots=True)
class Pin:
    """One pinned package. Example: ``Pin("apt", "git", "1:2.39.*", "cpu", "3.11")``; ``python`` is the stage's."""

    kind: str
    name: str
    version: str
    where: str
    python: str


def instructions(text: str) -> list[str]:
    """Returns the Dockerfile's instructions, continuation lines joined and comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\s*\n", " ", "\n".join(lines))
    for name, value in re.findall(r"^ARG (\w+)=(\S+)$", joined, re.MULTILINE):
        if name != "WITH_APEX":  # which stage it chooses is not known here
            joined = re.sub(rf"^(FROM .*)\$\{{{name}\}}", rf"\g<1>{value}", joined, flags=re.MULTILINE)
    return [line.strip() for line in joined.splitlines() if line.strip()]


def pins_of(text: str) -> tuple[list[Pin], list[str]]:
    """Returns the pins of a Dockerfile, constraint files included, and complaints about packages without one."""
    pins: list[Pin] = []
    complaints: list[str] = []
    pythons: dict[str, str] = {}
    stage = python = ""
    for line in instructions(text):
        if line.upper().startswith("FROM "):
            words = line.split()
            stage = words[3] if len(words) > 3 else words[1]
            version = re.search(r"python:(\d+\.\d+)", words[1])
            python = version[1] if version else pythons.get(words[1].replace("${WITH_APEX}", "0"), "")
            pythons[stage] = python
        elif line.startswith("COPY ") and "/constraints/" not in line:
            for name in re.findall(r"constraints/[\w.-]+\.txt", line):
                pins += constraint_pins(ROOT / name, python)
        if line.startswith("RUN "):
            for name, pinned in packages(line):
                if pinned:
                    pins.append(Pin("apt" if "apt-get install" in line else "pip", name, pinned, stage, python))
                else:
                    complaints.append(f"{stage}: {name} has no version")
    if "make install" in text:  # the Makefile's own constraints
        pins += constraint_pins(ROOT / "constraints" / "cpu-py311.txt", "3.11")
    return pins, complaints


def packages(line: str) -> Iterator[tuple[str, str]]:
    """Yields (name, version or "") of what a RUN line installs."""
    for command in re.split(r"&&|;", line.removeprefix("RUN ")):
        words = command.replace("'", "").split()
        if "apt-get" in words and "install" in words:
            for word in words[words.index("install") + 1 :]:
                if not word.startswith("-"):
                    yield word.partition("=")[0], word.partition("=")[2]
        elif any(word.endswith("pip") for word in words) and "install" in words:
            rest = iter(words[words.index("install") + 1 :])
            for word in rest:
                if word in ("--constraint", "-c", "--editable", "-e"):
                    next(rest, None)
                elif not word.startswith(("-", "/", ".")):
                    yield re.sub(r"\[.*?\]", "", word.partition("==")[0]), word.partition("==")[2]


def constraint_pins(file: Path, python: str) -> Iterator[Pin]:
    """Yields the pins of a constraints file; raises ValueError for a line that pins nothing."""
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text:
            name, separator, version = text.partition("==")
            if not separator:
                raise ValueError(f"{file.name}: {text!r} is not name==version")
            yield Pin("pip", name, version, file.name, python)


def disagreements(pins: list[Pin]) -> list[str]:
    """Returns pip pins of the Dockerfile that its constraints of the same Python contradict."""
    files: dict[str, dict[str, str]] = {}
    for pin in pins:
        if pin.kind == "pip" and pin.where.endswith(".txt"):
            files.setdefault(pin.where, {})[normal(pin.name)] = pin.version
    found = []
    for pin in pins:
        if pin.kind == "pip" and not pin.where.endswith(".txt"):
            versions = {table[normal(pin.name)] for table in files.values() if normal(pin.name) in table}
            if versions and pin.version not in versions:
                found.append(f"{pin.where}: {pin.name}=={pin.version}, but the constraints say {sorted(versions)}")
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def missing_apt(pins: list[Pin]) -> list[str]:
    """Returns the apt pins that no version of the index fits."""
    found = []
    for pin in sorted(set(pins), key=lambda pin: pin.name):
        done = subprocess.run(["apt-cache", "madison", pin.name], capture_output=True, text=True, check=False)
        versions = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.count("|") >= 2]
        if not any(fnmatch.fnmatchcase(version, pin.version) for version in versions):
            found.append(f"apt {pin.name}={pin.version} ({pin.where}): the index has {versions or 'nothing'}")
    return found


def missing_pip(pins: list[Pin], uv: str) -> list[str]:
    """Returns the pip pins that no wheel of the index fits, one file at a time."""
    found = []
    groups: dict[tuple[str, str], list[Pin]] = {}
    for pin in pins:
        groups.setdefault((pin.where, pin.python), []).append(pin)
    for (where, python), group in groups.items():
        print(f"pip: {len(group)} pins of {where} for Python {python}", flush=True)
        sources = [pin for pin in group if normal(pin.name) in SOURCE_ONLY]
        wheels = [pin for pin in group if pin not in sources]
        while wheels and (error := resolve(uv, python, wheels)):
            named = re.search(r"Because (?:there is no version of )?([\w.-]+)==", error)
            culprit = next((pin for pin in wheels if named and normal(pin.name) == normal(named[1])), None)
            if culprit is None:
                found.append(f"{where}: {error}")
                break
            wheels.remove(culprit)
            sources.append(culprit)
        found += [f"pip {pin.name}=={pin.version} ({where}): no such release" for pin in sources if not released(pin)]
    return found


def resolve(uv: str, python: str, pins: list[Pin]) -> str:
    """Returns the error of finding wheels for ``python``, nothing where all exist."""
    command = [uv, "pip", "compile", "--quiet", "--no-deps", "--python-version", python, "--python-platform", PLATFORM]
    text = "\n".join(f"{pin.name}=={pin.version}" for pin in pins)
    command += ["--only-binary", ":all:", "--prerelease", "allow", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else " ".join(done.stderr.split())


def released(pin: Pin) -> bool:
    """Returns whether the index has that version in any form: what has no wheel is built from source."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--pre", "--python-version", pin.python, pin.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    listed = re.search(r"Available versions: (.*)", done.stdout)
    print(f"pip: {pin.name}=={pin.version} has no wheel there and is built from source", flush=True)
    return listed is not None and pin.version in listed[1].split(", ")


def summary(pins: list[Pin]) -> str:
    apt, pip = ({(pin.name, pin.version) for pin in pins if pin.kind == kind} for kind in ("apt", "pip"))
    return f"{len(apt)} apt and {len(pip)} pip pins"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="check the forms only")
    parser.add_argument("--uv", default="uv", help="default %(default)s")
    options = parser.parse_args(arguments)
    try:
        pins, problems = pins_of((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"check_image_pins: {error}", file=sys.stderr)
        return 2
    problems += disagreements(pins)
    if not options.offline:
        problems += missing_apt([pin for pin in pins if pin.kind == "apt"])
        problems += missing_pip([pin for pin in pins if pin.kind == "pip"], options.uv)
    for problem in problems:
        print(f"check_image_pins: {problem}", file=sys.stderr)
    good = "every package is pinned, no contradictions" if options.offline else "all resolve"
    print(f"{summary(pins)}: " + (f"{len(problems)} problems" if problems else good))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
