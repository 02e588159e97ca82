"""What a Slurm cluster is like, as it says itself: its settings, partitions and nodes, and what a user may use. Read
once, for `grasp-dist doctor`; nothing is submitted. Formats are those of Slurm 20.11 and later."""

from __future__ import annotations

import getpass
import re
import subprocess
from dataclasses import dataclass, field

from grasp_dist.launch.slurm import call

__all__ = ["Association", "Node", "SlurmFacts", "ask", "megabytes_of", "read_facts"]

_SECONDS = 30
_OUT = ("down", "drain", "fail", "error", "unknown", "inval")


@dataclass(frozen=True)
class Node:
    """A node, as one of its partitions shows it."""

    name: str
    partition: str
    gpus: dict[str, int]
    """{type: how many}; the type is empty where the cluster does not name any."""
    cpus: int
    megabytes: int
    features: frozenset[str]
    state: str

    @property
    def is_up(self) -> bool:
        """Nodes that Slurm has switched off to save power count: they start when they are needed."""
        return not self.state.startswith(_OUT) and not self.state.endswith("*")

    def gpus_of(self, kind: str | None) -> int:
        return sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)


@dataclass(frozen=True)
class Association:
    """An account that this user may charge."""

    account: str
    partition: str
    qos: frozenset[str]


@dataclass
class SlurmFacts:
    """See `read_facts`."""

    settings: dict[str, str] = field(default_factory=dict)
    """As in `scontrol show config`."""
    partitions: dict[str, dict[str, str]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    associations: list[Association] | None = None
    """None: there is no database to ask."""
    qos: dict[str, dict[str, str]] | None = None

    @property
    def default_partition(self) -> str | None:
        return next((name for name, fields in self.partitions.items() if fields.get("Default") == "YES"), None)

    def setting(self, name: str) -> str:
        """Empty for one that is not set."""
        value = self.settings.get(name, "")
        return "" if value == "(null)" else value

    def enforces(self, what: str) -> bool:
        """Whether AccountingStorageEnforce holds jobs to `associations` or `qos`."""
        return what in self.setting("AccountingStorageEnforce").lower().replace("all", "associations,qos")


def read_facts() -> SlurmFacts:
    """Ask Slurm. Raises `OSError` with what went wrong if the controller does not answer."""
    code, out, error = ask("scontrol", "show", "config")
    if code:
        raise OSError(error or out)
    facts = SlurmFacts(dict(re.findall(r"^(\S+)\s*= ?(.*?)\s*$", out, re.MULTILINE)))
    _, out, _ = ask("scontrol", "--oneliner", "show", "partition")
    for line in out.splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        if name := fields.get("PartitionName"):
            facts.partitions[name] = fields
    _, out, _ = ask("sinfo", "--noheader", "--Node", "--format=%N|%R|%G|%c|%m|%f|%T")
    facts.nodes = [_node(*row) for line in out.splitlines() if len(row := line.split("|")) == 7]
    if facts.setting("AccountingStorageType").endswith("slurmdbd"):
        _read_accounts(facts)
    return facts


def ask(*command: str) -> tuple[int, str, str]:
    """Exit code, standard output, and what was said on standard error in one line; 127 and 124 for a command that is
    not there or does not answer."""
    try:
        done = call(command, seconds=_SECONDS)
    except FileNotFoundError:
        return 127, "", f"`{command[0]}` is not on this machine"
    except subprocess.TimeoutExpired:
        return 124, "", f"`{command[0]}` has not answered within {_SECONDS} s"
    return done.returncode, done.stdout, " ".join(done.stderr.split())


def megabytes_of(memory: str) -> float:
    """Of Slurm's `200G`, `4000` (megabytes), `512K`."""
    number, unit = re.fullmatch(r"(\d+)([KMGT]?)", memory).groups()  # type: ignore[union-attr]
    return int(number) * 1024 ** {"K": -1, "": 0, "M": 0, "G": 1, "T": 2}[unit]


def _node(name: str, partition: str, gres: str, cpus: str, memory: str, features: str, state: str) -> Node:
    gpus: dict[str, int] = {}
    for kind, count in re.findall(r"\bgpu(?::([^:(),]+))?:(\d+)(?=[(,]|$)", gres):
        gpus[kind] = gpus.get(kind, 0) + int(count)
    known = frozenset() if features == "(null)" else frozenset(features.split(","))
    return Node(name, partition, gpus, int(cpus.rstrip("+")), int(memory.rstrip("+")), known, state.lower())


def _read_accounts(facts: SlurmFacts) -> None:
    where = ["where", f"user={getpass.getuser()}", f"cluster={facts.setting('ClusterName')}"]
    code, out, _ = ask("sacctmgr", "-nP", "show", "assoc", *where, "format=account,partition,qos")
    if code == 0:
        rows = (line.split("|") for line in out.splitlines())
        facts.associations = [
            Association(row[0], row[1], frozenset(row[2].split(",")) - {""}) for row in rows if len(row) == 3
        ]
    code, out, _ = ask("sacctmgr", "-nP", "show", "qos", "format=name,maxwall,preemptmode,gracetime")
    if code == 0:
        rows = (line.split("|") for line in out.splitlines())
        facts.qos = {row[0]: dict(zip(("MaxWall", "PreemptMode", "GraceTime"), row[1:], strict=True)) for row in rows}
