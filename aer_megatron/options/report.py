"""Options of what a run shows and keeps of itself."""

from __future__ import annotations

from pydantic import Field

from aer_megatron.config_section import Section


class ReportSection(Section):
    progress: bool = Field(True, description="live display on rank 0")
    tensorboard: bool = True
    picture: bool = Field(True, description="write report.png at the end")
    flight_recorder: bool = Field(True, description="write flight.jsonl, from which controllers can be replayed")
