"""What the reproduction is measured by: the largest difference of a kind of result, and its limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of the summary."""

    what: str
    """The quantity, and how its difference is taken."""
    count: int
    """Values compared."""
    largest: float
    """The largest difference among them; for objectives the signed one."""
    limit: float
    """What it must not exceed."""

    @property
    def holds(self) -> bool:
        """Whether it is within the limit."""
        return self.largest <= self.limit
