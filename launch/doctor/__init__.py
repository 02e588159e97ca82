"""`grasp-dist doctor`: what would go wrong with a launch, found before it, each with what to do about it.

Works without Slurm, Ray and GPUs: what cannot be looked at is skipped, with the reason. Only `deep` submits jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from grasp_dist.config import RunConfig
from grasp_dist.launch.cluster import Cluster, load_cluster
from grasp_dist.launch.doctor.check import Check

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Check", "doctor", "show", "summary"]

_COLORS = {"ok": "green", "warning": "yellow", "failure": "bold red", "skipped": "dim"}


def doctor(
    cluster: str | None = None,
    config: RunConfig | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    deep: bool = False,
    say: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Every finding, in the order in which they were made; each is given to `say` at once.

    cluster: name or path, with `overrides` on top. deep: submit a short job for each kind of job. Raises `InputError`
    for a cluster file that cannot be used at all.
    """
    known = load_cluster(cluster, overrides)[1] if cluster else None
    found = []
    for check in _checks(known, config, deep):
        say(check)
        found.append(check)
    return found


def _checks(cluster: Cluster | None, config: RunConfig | None, deep: bool) -> Iterator[Check]:
    from grasp_dist.launch.doctor.folders import check_folders
    from grasp_dist.launch.doctor.machine import check_machine
    from grasp_dist.launch.doctor.processes import check_processes
    from grasp_dist.launch.doctor.software import check_software

    yield from check_software(cluster, config)
    yield from check_folders(cluster, config)
    if cluster:
        yield from check_machine(cluster)
    yield from check_processes(cluster)
    if cluster and cluster.kind == "slurm":
        from grasp_dist.launch.doctor.slurm_cluster import check_slurm

        yield from check_slurm(cluster, config)
    if cluster and cluster.kind == "ray":
        from grasp_dist.launch.doctor.ray_cluster import check_ray

        yield from check_ray(cluster)
    if cluster and deep:
        from grasp_dist.launch.doctor.nodes import check_nodes

        yield from check_nodes(cluster, config)


def show(check: Check, console: Console) -> None:
    """One finding, and under it what to do."""
    from rich.text import Text

    state = (f"{check.state:>8}", _COLORS[check.state])
    line = Text.assemble(state, "  ", (f"{check.group}: {check.name}", "bold"), "  ", check.found)
    console.print(line, soft_wrap=True)
    if check.remedy:
        console.print(Text(f"{'':>8}  -> {check.remedy}"), soft_wrap=True)


def summary(checks: list[Check]) -> str:
    """One line: how many findings of each state."""
    counts = {state: sum(check.state == state for check in checks) for state in _COLORS}
    return (
        f"{len(checks)} checks: {counts['failure']} failure(s), {counts['warning']} warning(s), {counts['ok']} ok, "
        f"{counts['skipped']} skipped"
    )
