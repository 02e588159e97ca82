"""What `grasp-dist doctor` finds: one thing looked at, its state, what was seen, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DEEP", "Check", "Group", "State"]

DEEP = "--deep looks on the nodes"

State = Literal["ok", "warning", "failure", "skipped"]
"""failure: jobs would not run, or run what they should not; warning: they run, and something is worth knowing."""


@dataclass(frozen=True)
class Check:
    """One finding. Every failure and warning has a remedy; what is skipped says why in `found`."""

    group: str
    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Group:
    """Makes the findings of one room of the doctor."""

    title: str

    def ok(self, name: str, found: str) -> Check:
        return Check(self.title, name, "ok", found)

    def warning(self, name: str, found: str, remedy: str) -> Check:
        return Check(self.title, name, "warning", found, remedy)

    def failure(self, name: str, found: str, remedy: str) -> Check:
        return Check(self.title, name, "failure", found, remedy)

    def skipped(self, name: str, reason: str) -> Check:
        return Check(self.title, name, "skipped", reason)
