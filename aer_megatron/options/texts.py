"""Types of options that are text: not empty, and a path's ``~`` made the home folder."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator

SEED_LIMIT = 2**63  # torch, NumPy and the servers all take seeds below it


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty; give it, or leave the option out for its default")
    return text


def _expand_home(path: str | None) -> str | None:
    """Returns the path with a leading ``~`` or ``~user`` replaced: no shell does that in a run file."""
    expanded = os.path.expanduser(path or "")
    if expanded.startswith("~"):
        raise ValueError("names a home folder that this machine does not know; write the path in full (or ./~...)")
    return expanded if path else path


Text = Annotated[str, AfterValidator(_not_blank)]
PathText = Annotated[str, AfterValidator(_not_blank), AfterValidator(_expand_home)]
PathOrEmpty = Annotated[str, AfterValidator(_expand_home)]


def _optional_path(path: str | None) -> str | None:
    return path if path is None else _expand_home(_not_blank(path))


def _optional_text(text: str | None) -> str | None:
    return text if text is None else _not_blank(text)


# the union inside: the field's type is then what the documentation prints
OptionalPath = Annotated[str | None, AfterValidator(_optional_path)]
OptionalText = Annotated[str | None, AfterValidator(_optional_text)]
