"""The options of the configuration, parted by whether a run has them without naming another rule."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from aer_megatron.config import Config
from aer_megatron.config_section import ANY_NAME, describe

SET = "--eval.sets.held_out.source.task=countdown"  # what a run needs to have the options of an evaluation set


def described_options() -> Iterator[tuple[str, str, str, str]]:
    """Yields (dotted key, type, default, the override that a run needs to have it, or nothing)."""
    rows = [(key.replace(ANY_NAME, "held_out"), *rest) for key, *rest in describe(Config)]
    defaults = {key: json.loads(default) for key, _, default, _ in rows if key.endswith(".kind")}
    for key, form, default, text in rows:
        of_rules = re.search(r"\(kind = (.*)\)$", text)
        chosen = f"{key.rpartition('.')[0]}.kind"
        kinds = of_rules[1].split(", ") if of_rules else [defaults.get(chosen)]
        yield key, form, default, "" if defaults.get(chosen) in kinds else f"--{chosen}={kinds[0]}"
