"""Options of what a run shows and keeps of itself."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from aer_megatron.config_section import IMPORTABLE, Section

MOVED_OPTIONS = {
    "report.tensorboard": 'write "tensorboard" into the list report.sinks, or leave it out there',
    "report.progress": 'write "console" into the list report.sinks, or leave it out there',
}
SINK_NAMES = ("console", "tensorboard", "wandb", "mlflow")


class ReportSection(Section):
    sinks: tuple[str, ...] = Field(
        ("console", "tensorboard"),
        strict=False,
        description='where metrics go beside metrics.jsonl: "console", "tensorboard", "wandb", "mlflow", or a class of '
        'yours, "package.module:name"',
    )
    sink_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description='options of a sink by its name: [report.sink_options.wandb] project = "..."'
    )
    picture: bool = Field(True, description="write report.png at the end")
    html: bool = Field(True, description="write report.html at the end: the whole run in one page")
    flight_recorder: bool = Field(True, description="write flight.jsonl, from which controllers can be replayed")
    samples: int = Field(
        2,
        ge=0,
        description="groups a step kept in samples/, beside all of evaluation; 0 = none",
    )

    @model_validator(mode="after")
    def _names_of_sinks(self) -> Self:
        for name in (*self.sinks, *self.sink_options):
            if name not in SINK_NAMES and IMPORTABLE.fullmatch(name) is None:
                raise ValueError(
                    f"there is no sink {name[:80]!r}; sinks are {', '.join(map(repr, SINK_NAMES))} and classes of your "
                    "own, 'package.module:name'"
                )
        if len(set(self.sinks)) < len(self.sinks):
            raise ValueError(f"sinks={list(self.sinks)} names one twice; name each once")
        return self
