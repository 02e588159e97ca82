"""Rendered sbatch scripts: one per job of the graph, to be read, kept and edited by people.

A script says everything but job ids: what waits for what is said on sbatch's command line, so a script is the same
before and after it is submitted. Every value is quoted for the shell where it is put in; what stands in `#SBATCH`
lines, which no shell reads, is of a limited alphabet (`grasp_dist.launch.values`) or made here.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_dist.errors import InputError
from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.jobs import Job

__all__ = [
    "Place",
    "command",
    "dependency",
    "directives",
    "job_name",
    "python_of",
    "render",
    "script_name",
    "surroundings",
    "template",
]

CONFIG = "config.yaml"
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


@dataclass(frozen=True)
class Place:
    """Where a launch's files are, and what its jobs need to know of this machine."""

    folder: Path
    """The launch folder, absolute."""
    workdir: Path
    """Where relative paths of the configuration start, absolute."""
    run_dir: Path
    slurm_conf: str | None = None
    """SLURM_CONF where it is set: the scripts talk to the same Slurm."""

    def __post_init__(self) -> None:
        for path in (self.folder, self.workdir, self.run_dir, Path(sys.executable)):
            if not str(path).isprintable():
                raise InputError(
                    f"the path {str(path)!r} holds a line break or another control character, which job scripts cannot "
                    "hold; choose another run_dir or working directory"
                )
        if set("%\\") & set(str(self.folder)):
            raise InputError(
                f"the path {self.folder} holds a % or a backslash, which Slurm replaces in the names of output files; "
                "choose another run_dir"
            )


def script_name(key: str) -> str:
    return f"{key}.sbatch"


def job_name(key: str, run_dir: Path) -> str:
    """As `squeue` shows it: run directory and job."""
    run = re.sub(r"[^A-Za-z0-9._-]+", "-", run_dir.name)[:40].strip("-") or "run"
    return f"{run}-{key}"


def dependency(job: Job, ids: Mapping[str, str]) -> list[str]:
    """sbatch's option that makes a job wait for those before it. ids: {job key: id, or a shell variable for it}; jobs
    that are not in it are finished."""
    waits = [f"afterok:{':'.join(found)}"] if (found := [ids[key] for key in job.after if key in ids]) else []
    if job.after_each in ids:
        waits.append(f"aftercorr:{ids[str(job.after_each)]}")
    return [f"--dependency={','.join(waits)}"] if waits else []


def render(job: Job, cluster: Cluster, place: Place) -> str:
    """The text of a job's script. Raises `InputError` for a path that a container's mount option cannot hold."""
    count = f"{len(job.tasks)} tasks, one per element" if job.is_array else job.tasks[0]
    return template("job.sbatch.j2").render(
        title=f"{job.key} of {place.run_dir}: {count}",
        file=script_name(job.key),
        key=job.key,
        directives=directives(job, cluster, place),
        tasks=job.tasks,
        stage=job.stage,
        config=CONFIG,
        command=command(job, cluster, place, program="-m grasp_dist.launch.task"),
        **surroundings(job, cluster, place),
    )


def surroundings(job: Job, cluster: Cluster, place: Place) -> dict[str, Any]:
    """What every job's template says about the cluster around the program."""
    wanted = cluster.resources(job.kind)
    environment = dict(cluster.environment)
    if cluster.interface:
        environment = {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface} | environment
    if place.slurm_conf:
        environment["SLURM_CONF"] = place.slurm_conf
    return {
        "folder": str(place.folder),
        "workdir": str(place.workdir),
        "modules": cluster.modules,
        "setup": cluster.setup,
        "environment": list(environment.items()),
        "scratch": cluster.scratch,
        "cpus_per_task": wanted.cpus_per_task,
        "nodes": wanted.nodes,
        "lead": cluster.lead_seconds,
        "requeue": cluster.requeue,
        "max_requeues": cluster.max_requeues,
        "srun_options": cluster.srun_options,
    }


def directives(job: Job, cluster: Cluster, place: Place) -> list[str]:
    """What stands behind `#SBATCH --`, line by line."""
    wanted, gpus = cluster.resources(job.kind), cluster.gpus_of(job.kind)
    lines = [
        f"job-name={job_name(job.key, place.run_dir)}",
        # Relative to the folder that it is submitted from, so that no path has to stand here.
        f"output=logs/%x-{'%A_%a' if job.is_array else '%j'}.out",
        "open-mode=append",
    ]
    if job.is_array:
        width = f"%{cluster.max_array_width}" if cluster.max_array_width else ""
        lines.append(f"array=0-{len(job.tasks) - 1}{width}")
    for name, value in {
        "partition": wanted.partition or cluster.partition,
        "account": cluster.account,
        "qos": wanted.qos or cluster.qos,
        "constraint": wanted.constraint or cluster.constraint,
        "reservation": cluster.reservation,
    }.items():
        if value:
            lines.append(f"{name}={value}")
    lines += [f"nodes={wanted.nodes}", f"ntasks-per-node={cluster.tasks_of(job.kind)}"]
    if gpus and cluster.gpu_option != "none":
        of_type = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        lines.append(f"gres=gpu:{of_type}{gpus}" if cluster.gpu_option == "gres" else f"gpus-per-node={of_type}{gpus}")
    if wanted.cpus_per_task:
        lines.append(f"cpus-per-task={wanted.cpus_per_task}")
    if wanted.memory:
        lines.append(f"mem={wanted.memory}")
    if wanted.exclusive:
        lines.append("exclusive")
    return [
        *lines,
        f"time={wanted.time}",
        f"signal=B:USR1@{cluster.lead_seconds}",
        "requeue" if cluster.requeue else "no-requeue",
        # A job whose forerunner has failed would else wait for ever.
        "kill-on-invalid-dep=yes",
    ]


def command(job: Job, cluster: Cluster, place: Place, *, program: str) -> list[str]:
    """What stands behind `srun`, ready for the shell, as lines: its options, the container, Python with `program`."""
    container = cluster.container
    srun = [shlex.quote(option) for option in cluster.srun_options]
    program = f"{shlex.quote(python_of(cluster))} {program}"
    if container.runtime == "none":
        return [*srun, program]
    mounts = [_mount(place.run_dir.absolute()), _mount(place.workdir), *container.mounts]
    options = [shlex.quote(option) for option in container.options]
    image, workdir = shlex.quote(str(container.image)), shlex.quote(str(place.workdir))
    if container.runtime == "pyxis":
        own = [f"--container-image={image}", f"--container-mounts={shlex.quote(','.join(mounts))}"]
        return [*srun, *own, f"--container-workdir={workdir}", *options, program]
    gpus = ["--nv"] if cluster.gpus_of(job.kind) else []
    binds = [f"--bind {shlex.quote(mount)}" for mount in mounts]
    return [*srun, "apptainer exec", *gpus, *binds, f"--pwd {workdir}", *options, image, program]


def python_of(cluster: Cluster) -> str:
    """The Python that has grasp_dist, as a job's processes see it."""
    return cluster.python or (sys.executable if cluster.container.runtime == "none" else "python3")


def _mount(path: Path) -> str:
    if any(character in str(path) for character in ",:"):
        raise InputError(
            f"{path} holds a comma or a colon, which a container's mount option takes for its own; choose another "
            "run_dir or working directory"
        )
    return f"{path}:{path}"


def _literal(text: str) -> str:
    """In single quotes, also where the shell would not need them."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _expand(path: str) -> str:
    """A path as a shell word in which environment variables, and nothing else, are filled in on the node."""
    words, end = [], 0
    for match in _VARIABLE.finditer(path):
        words.append(shlex.quote(path[end : match.start()]) if match.start() > end else "")
        words.append(f'"${{{match[1] or match[2]}}}"')
        end = match.end()
    return "".join([*words, shlex.quote(path[end:]) if end < len(path) else ""])


def template(name: str) -> Any:
    """A template of job scripts, with the filters that every value goes through."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("grasp_dist.launch", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a shell script: every value goes through `quote`
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["literal"] = _literal
    environment.filters["expand"] = _expand
    return environment.get_template(name)
