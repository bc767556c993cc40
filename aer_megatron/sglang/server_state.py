"""What one rank knows of a server: whether it is in service, and what may bring it back.

probe     it answers and still carries the verified version (it was unreachable, or a supervisor restored it)
transfer  the next weight transfer to it is verified (it hung, or failed again and again)
restart   it runs in a new process (it answered garbage)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Comeback = Literal["probe", "transfer", "restart"]


@dataclass(slots=True)
class Server:
    """One server as this rank sees it; ``index`` counts those of ``sglang.urls``."""

    index: int
    url: str
    in_service: bool = False
    reason: str = "no weights were transferred yet"  # why it is not in service
    comeback: Comeback = "transfer"
    in_flight: int = 0
    num_failures: int = 0  # in a row

    @property
    def name(self) -> str:
        """The server in messages."""
        return f"server {self.index} ({self.url})"
