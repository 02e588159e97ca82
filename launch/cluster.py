"""What a cluster is like: a typed YAML file, by the name of one that comes along (cluster_configs/) or by its path.

Every value ends up in a shell script, an `#SBATCH` line or a command, so what may stand in it is limited (values.py),
and quoted there. The exception is `setup`, which is the user's own shell. Needs pydantic and PyYAML only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from grasp_dist.errors import InputError
from grasp_dist.launch.values import (
    Address,
    Constraint,
    Folder,
    Image,
    Interface,
    Memory,
    Module,
    Mount,
    Name,
    Option,
    Partition,
    Program,
    Scratch,
    Seconds,
    Text,
    Time,
    Variable,
    seconds_of,
)
from grasp_dist.settings import Section, merge, read_tree, validate

__all__ = ["Cluster", "Container", "Kind", "Resources", "cluster_names", "load_cluster", "seconds_of"]


Kind = Literal["train", "evaluate", "light"]
"""Of jobs, by what they need: training (naive, warm detection, project), scoring, or a CPU for a minute."""

_OF_THE_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_OF_SLURM = {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"}
_OF_BASH = {"BASHOPTS", "BASH_VERSINFO", "EUID", "IFS", "PPID", "SHELLOPTS", "UID"}
_SRUN_OURS = {
    "-K",
    "-N",
    "-n",
    "-o",
    "-e",
    "-i",
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--output",
    "--error",
}
_SRUN_OURS |= {"--input", "--kill-on-bad-exit", "--multi-prog", "--jobid", "--export"}
_SRUN_OURS |= {"--container-image", "--container-mounts", "--container-workdir"}
_ELSEWHERE = (
    "nodes and processes are laid out by train, evaluate and light, images and mounts by container, variables by "
    "environment"
)
# Without its environment a process does not know its number; short options may stand in a row.
_APPTAINER_OURS = {"--cleanenv", "--containall", "--bind", "--mount", "--pwd", "--cwd"}
_APPTAINER_SHORT = re.compile(r"-[cfinpuw]*[eCB]")
_BY_SBATCH = ("partition", "account", "qos", "constraint", "reservation")


class Part(Section):
    """A section of the file, in which a key without a value (all that was under it is commented out) is its default."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {key: value for key, value in tree.items() if value is not None or key not in cls.model_fields}


class Resources(Part):
    """What a job of one kind gets."""

    nodes: Annotated[int, Field(ge=1)] = 1
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """Default: all that a node has."""
    tasks_per_node: Annotated[int, Field(ge=1)] | None = None
    """Processes per node; default, and with GPUs always: one per GPU."""
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    memory: Memory | None = None
    """Per node, as Slurm writes it (`200G`; `0`: all)."""
    time: Time = "04:00:00"
    """Wall-clock limit: minutes, HH:MM:SS or D-HH:MM:SS."""
    partition: Partition | None = None
    """In place of the cluster's."""
    qos: Name | None = None
    constraint: Constraint | None = None
    exclusive: bool = False
    """Nobody else's jobs on these nodes."""


class LightResources(Resources):
    """As `Resources`, but what is not given is small."""

    gpus_per_node: Annotated[int, Field(ge=0)] | None = 0
    time: Time = "00:30:00"


class Container(Part):
    """The image that the processes run in, if any."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    image: Image | None = None
    """A file or a registry's name."""
    mounts: list[Mount] = []
    """`/outside:/inside` or `/both`; the run directory and the working directory are always mounted."""
    options: list[Option] = []
    """Further options, a word each: of srun for pyxis, of `apptainer exec` for apptainer."""

    @model_validator(mode="after")
    def _image(self) -> Container:
        if self.runtime != "none" and not self.image:
            raise ValueError(f"container.runtime is {self.runtime!r}, so container.image must name an image")
        return self

    @model_validator(mode="after")
    def _options(self) -> Container:
        for option in self.options:
            if self.runtime == "pyxis" and _is_of_srun(option):
                raise ValueError(f"container.options: {option} is the launcher's own to set; {_ELSEWHERE}")
            if self.runtime == "apptainer" and _is_of_apptainer(option):
                raise ValueError(
                    f"container.options: {option} is the launcher's own to set, or keeps the processes' variables from "
                    "them (SLURM_PROCID, MASTER_ADDR); what is mounted is said by container.mounts, variables by "
                    "environment"
                )
        return self


def _is_of_srun(option: str) -> bool:
    return option.partition("=")[0] in _SRUN_OURS or (not option.startswith("--") and option[:2] in _SRUN_OURS)


def _is_of_apptainer(option: str) -> bool:
    return option.partition("=")[0] in _APPTAINER_OURS or _APPTAINER_SHORT.match(option) is not None


class Cluster(Part):
    """Where jobs run, and what its users have to say for that."""

    kind: Literal["slurm", "local", "ray"] = "slurm"
    launcher: Literal["sbatch", "submitit"] = "sbatch"
    """slurm: rendered scripts that you can read, keep and edit; or submitit."""
    partition: Partition | None = None
    account: Name | None = None
    qos: Name | None = None
    constraint: Constraint | None = None
    reservation: Name | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs that a node has; 0: train on CPUs."""
    cpus_per_node: Annotated[int, Field(ge=1)] | None = None
    gpu_type: Name | None = None
    """As in `--gres=gpu:<type>:8`, where the cluster asks for it."""
    gpu_option: Literal["gres", "gpus-per-node", "none"] = "gres"
    """How this cluster wants to be asked for GPUs; none: whole nodes are handed out."""
    train: Resources = Resources()
    """naive, warm detection, project."""
    evaluate: Resources = Resources()
    light: LightResources = LightResources()
    """One-shot detection and the report: one process, on a CPU."""
    interface: Interface | None = None
    """Network interface of the process groups (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."""
    environment: dict[Variable, Text] = {}
    """Environment of every process: NCCL, EFA and InfiniBand settings, caches."""
    modules: list[Module] = []
    """`module load`ed in this order."""
    setup: list[Text] = []
    """Shell lines of your own, run as they are in each job before the work."""
    container: Container = Container()
    python: Program | None = None
    """Python that has grasp_dist, as the nodes (or the container) see it; default: the one that launches."""
    shared: list[Folder] = []
    """Folders that every node sees; run directory, local model and data must be in one. Empty: not checked."""
    scratch: Scratch | None = None
    """Fast local folder of each node, used as TMPDIR; environment variables in it are filled in on the node."""
    lead_seconds: Seconds = 120
    """Seconds before the time limit at which the processes are asked to save; as `checkpoint.lead_seconds`."""
    requeue: bool = True
    """Go on by themselves: jobs that were preempted, ran into their limit or lost a node."""
    max_requeues: Annotated[int, Field(ge=0)] = 20
    """Restarts of one job, after which it fails."""
    max_array_width: Annotated[int, Field(ge=1)] | None = None
    """Elements of a job array that run at once."""
    max_array_size: Annotated[int, Field(ge=1, le=4_000_000)] = 1000
    """Slurm's MaxArraySize, less one."""
    srun_options: list[Option] = []
    """Further options of srun, a word each."""
    address: Address = "auto"
    """ray: address of the running cluster; `local` starts one on this machine."""

    @model_validator(mode="after")
    def _fits(self) -> Cluster:
        for kind in get_args(Kind):
            self._check_resources(kind)
        return self

    @model_validator(mode="after")
    def _environment(self) -> Cluster:
        for name in self.environment:
            where = f"environment.{name}"
            if name in _OF_THE_LAUNCHER | _OF_SLURM:
                raise ValueError(f"{where}: every process is given its own value when it starts; leave it out")
            if name in _OF_BASH:
                raise ValueError(f"{where}: bash keeps this variable for itself; leave it out")
            if name == "TMPDIR" and self.scratch:
                raise ValueError(f"{where}: TMPDIR is what `scratch` says; leave one of the two out")
            if name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") and self.interface:
                raise ValueError(f"{where}: it is what `interface` says; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _srun(self) -> Cluster:
        for option in self.srun_options:
            if _is_of_srun(option):
                raise ValueError(f"srun_options: {option} is the launcher's own to set; {_ELSEWHERE}")
        return self

    @model_validator(mode="after")
    def _shell(self) -> Cluster:
        """A line that goes on where it should have ended would take the rest of the job's script with it."""
        bash = shutil.which("bash")
        if not self.setup or bash is None:
            return self
        if len(self.setup[-1]) - len(self.setup[-1].rstrip("\\")) & 1:
            raise ValueError("setup: its last line ends with a backslash, and would swallow the job's next line")
        lines = "\n".join(self.setup) + "\n"
        clean = {key: value for key, value in os.environ.items() if key not in ("BASH_ENV", "SHELLOPTS", "BASHOPTS")}
        found = subprocess.run(
            [bash, "--norc", "-n"], input=lines, env=clean, capture_output=True, text=True, timeout=10, check=False
        )
        if found.returncode or found.stderr.strip():
            said = re.sub(r"^.*?bash: ", "", found.stderr.strip().splitlines()[0]) if found.stderr.strip() else ""
            raise ValueError(f"setup: bash cannot read these lines ({said}); try them with `bash -n`")
        return self

    def _check_resources(self, kind: Kind) -> None:
        wanted = self.resources(kind)
        gpus, tasks = self.gpus_of(kind), self.tasks_of(kind)
        if gpus > self.gpus_per_node:
            raise ValueError(
                f"{kind}.gpus_per_node is {gpus}, but a node has {self.gpus_per_node} (gpus_per_node); ask for more "
                "nodes instead"
            )
        if kind == "light" and (wanted.nodes > 1 or gpus > 1 or (wanted.tasks_per_node or 1) > 1):
            raise ValueError(
                "light jobs are one process: light.nodes and light.tasks_per_node can only be 1, and "
                "light.gpus_per_node 0 or 1"
            )
        if gpus and tasks != gpus:
            raise ValueError(
                f"{kind}.tasks_per_node is {tasks}, but each of the {gpus} GPUs of a node gets one process; leave it "
                f"out, or set {kind}.gpus_per_node"
            )
        if self.kind == "local" and wanted.nodes > 1:
            raise ValueError(f"{kind}.nodes is {wanted.nodes}, but a cluster of kind local is this machine alone")
        cpus = tasks * (wanted.cpus_per_task or 1)
        if self.cpus_per_node is not None and cpus > self.cpus_per_node:
            raise ValueError(
                f"{kind} asks for {cpus} CPUs on each node (tasks times cpus_per_task), but a node has "
                f"{self.cpus_per_node} (cpus_per_node)"
            )
        if self.kind == "slurm" and seconds_of(wanted.time) <= self.lead_seconds:
            raise ValueError(
                f"{kind}.time is {wanted.time}, which is no longer than lead_seconds ({self.lead_seconds} s): the "
                "job would be asked to stop as it starts; give it more time"
            )

    def resources(self, kind: Kind) -> Resources:
        """What a kind of job gets."""
        return {"train": self.train, "evaluate": self.evaluate, "light": self.light}[kind]

    def gpus_of(self, kind: Kind) -> int:
        """GPUs on each node of a kind of job."""
        wanted = self.resources(kind)
        return self.gpus_per_node if wanted.gpus_per_node is None else wanted.gpus_per_node

    def tasks_of(self, kind: Kind) -> int:
        """Processes on each node."""
        wanted = self.resources(kind)
        return 1 if kind == "light" else wanted.tasks_per_node or max(1, self.gpus_of(kind))


def cluster_names() -> list[str]:
    """The clusters that come along."""
    return sorted(path.name.removesuffix(".yaml") for path in _files("*.yaml"))


def load_cluster(name: str, overrides: dict[str, Any] | None = None) -> tuple[str, Cluster]:
    """A cluster by the name of one that comes along or by the path of a YAML file, with dotted overrides on top; and
    the name that it goes by. What is not given of `partition`, `account`, `qos`, `constraint` and `reservation` is what
    the user's environment says for sbatch (SBATCH_ACCOUNT, ...), so that scripts show it.

    Raises `InputError` for one that is not there, an unknown key (with the nearest known one) or a bad value.
    """
    path = next((path for path in _files("*.yaml") if path.name == f"{name}.yaml"), None)
    if path is None:
        path = Path(name)
        with contextlib.suppress(RuntimeError):  # the home of a user that there is not
            path = path.expanduser()
        if path.suffix not in (".yaml", ".yml") or not _is_file(path):
            raise InputError(
                f"there is no cluster {name!r}: give one of {', '.join(cluster_names())}, or the path of a YAML file "
                "like those (docs/clusters.md)"
            )
    # It is written into scripts and records.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.stem, re.ASCII):
        raise InputError(
            f"the file {path.name!r} gives the cluster its name, which can hold letters, digits and . _ - only; rename "
            "the file"
        )
    tree = merge(read_tree(path, hint="docs/clusters.md has an example"), overrides or {})
    if (tree.get("kind") or "slurm") == "slurm":
        usual = {name: os.environ.get(f"SBATCH_{name.upper()}") for name in _BY_SBATCH}
        tree |= {name: value for name, value in usual.items() if value and tree.get(name) is None}
    return path.stem, validate(Cluster, tree, path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or a null byte
        return False


def _files(pattern: str) -> list[Path]:
    folder = Path(os.fspath(resources.files("grasp_dist.cluster_configs")))  # type: ignore[call-overload]
    return sorted(folder.glob(pattern))
