"""The fuzz targets by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.reliability.fuzz_answers import ANSWER_TARGETS
from benchmarks.reliability.fuzz_files import FILE_TARGETS
from benchmarks.reliability.fuzz_settings import SETTING_TARGETS
from benchmarks.reliability.fuzz_target import Target

TARGETS: Mapping[str, Target] = MappingProxyType(
    {item.name: item for item in (*SETTING_TARGETS, *FILE_TARGETS, *ANSWER_TARGETS)}
)
