"""Samples of an evaluation on disk, so that one that was killed goes on where it was.

A line of JSON holds all samples of one problem at one temperature, under the key of what decides them (weights, problem
set, sampling, grader). A line is appended when its samples are judged; the part of a line that a killed process leaves
behind is cut off.

    {"key": "...", "set": "gsm8k", "temperature": 0.6, "index": 3, "id": "00c1...", "samples": [
     {"token_ids": [12, 7], "reward": 1.0, "reason": "correct", "truncated": false}], "classes": [1], "right": 0}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aer_megatron.evaluate.result import Problem, check_classes
from aer_megatron.files.json_input import parse_json
from aer_megatron.files.whole_files import LineFile

_MAX_LINE_BYTES = 1 << 28
_MAX_PROBLEM_CHARS = 200
Place = tuple[str, int]  # key, and the problem's index in its set


class _Sample(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]]
    reward: float
    reason: str
    truncated: bool


class Line(BaseModel):
    """The samples of one problem at one temperature."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    key: str
    set: str
    temperature: float
    index: Annotated[int, Field(ge=0)]
    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    samples: Annotated[list[_Sample], Field(min_length=1)]
    classes: list[Annotated[int, Field(ge=1)]] | None
    right: int | None

    @model_validator(mode="after")
    def _classes(self) -> Line:
        check_classes(len(self.samples), self.classes, self.right)
        return self

    @property
    def place(self) -> Place:
        return self.key, self.index

    def summed(self, problem: str) -> Problem:
        """Returns the counts of the samples."""
        ids = [sample.token_ids for sample in self.samples]
        return Problem(
            id=self.id,
            problem=problem[:_MAX_PROBLEM_CHARS],
            samples=len(ids),
            correct=sum(sample.reward >= 1 for sample in self.samples),
            truncated=sum(sample.truncated for sample in self.samples),
            reward=sum(sample.reward for sample in self.samples),
            tokens=sum(map(len, ids)),
            classes=self.classes,
            right=self.right,
            digest=hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
        )


class SampleFile:
    """The lines of ``path``; those of ``problems`` (key -> the texts of its problems) are summed up and kept in memory.

    Raises:
        ValueError: a line before the last one is malformed, too long or stands twice.
    """

    def __init__(self, path: Path, problems: Mapping[str, Sequence[str]]) -> None:
        self.path = path
        self._problems = problems
        self._lines = LineFile(path)
        self.done: dict[Place, Problem] = {}
        for line in _whole_lines(path):
            self._keep(line)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends the lines that are not there yet, all of them in one write.

        Raises:
            OSError: they cannot be written for another reason than room; RuntimeError at ``close`` where there is none.
        """
        lines = [Line.model_validate(row) for row in rows]
        new = [line for line in lines if line.place not in self.done]
        for line in new:
            self._keep(line)
        if new:
            self._lines.append("\n".join(line.model_dump_json() for line in new))

    def close(self) -> None:
        """Writes what found no room; raises RuntimeError where there is none yet."""
        self._lines.close()

    def _keep(self, line: Line) -> None:
        texts = self._problems.get(line.key, ())
        if line.index >= len(texts):
            return  # of an evaluation that is not asked for now
        if line.place in self.done:
            raise ValueError(f"{self.path} holds problem {line.index} of {line.set} twice; remove one of the lines")
        self.done[line.place] = line.summed(texts[line.index])


def _whole_lines(path: Path) -> Iterator[Line]:
    """Yields the lines of a file, and cuts off the part of one at its end."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        end = number = 0
        while raw := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if not raw.endswith(b"\n"):
                if len(raw) > _MAX_LINE_BYTES:
                    raise ValueError(f"{path}, line {number} is longer than {_MAX_LINE_BYTES} bytes; remove the file")
                break
            try:
                yield Line.model_validate(parse_json(raw))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                what = f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg']}"
                raise ValueError(f"{path}, line {number} is none of an evaluation: {what}; remove the line") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is {error}; remove the line") from None
            end += len(raw)
    if end < path.stat().st_size:
        os.truncate(path, end)
