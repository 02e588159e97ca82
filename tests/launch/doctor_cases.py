"""What the tests of the doctor have in common: clusters, and findings by name."""

from __future__ import annotations

from collections.abc import Iterable

from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.doctor.check import Check

__all__ = ["NOWHERE", "cluster", "the", "told"]

NOWHERE = "/proc"  # where not even root can write


def cluster(**settings: object) -> Cluster:
    return Cluster.model_validate(settings)


def told(checks: Iterable[Check], name: str) -> list[Check]:
    """The findings of one name; of all of them every one that is not well has a remedy or a reason."""
    found = list(checks)
    for check in found:
        assert check.found
        assert bool(check.remedy) == (check.state in ("warning", "failure")), check
    return [check for check in found if check.name == name]


def the(checks: Iterable[Check], name: str) -> Check:
    (check,) = told(checks, name)
    return check
