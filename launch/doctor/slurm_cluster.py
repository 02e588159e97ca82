"""Slurm: whether it answers, has what a cluster file names, can ever start such jobs, and lets them save and come back.

What is asked for is compared with what Slurm says, so that a finding can name the field; at last sbatch judges the very
scripts that would be submitted, without submitting them (`--test-only`)."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from grasp_dist.config import RunConfig
from grasp_dist.errors import InputError
from grasp_dist.launch.cluster import Cluster, Kind, seconds_of
from grasp_dist.launch.doctor.check import Check, Group
from grasp_dist.launch.doctor.slurm_facts import Node, SlurmFacts, ask, megabytes_of, read_facts
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.preconditions import check_lead
from grasp_dist.launch.scripts import Place, render

__all__ = ["check_slurm"]

SLURM = Group("slurm")
COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_UNLIMITED = ("UNLIMITED", "INFINITE", "NONE", "N/A", "")


def check_slurm(cluster: Cluster, config: RunConfig | None) -> Iterator[Check]:
    """From a login node. Elsewhere, where no job can be submitted, all of it is skipped."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if len(missing) == len(COMMANDS):
        yield SLURM.skipped(
            "commands",
            "this machine has no Slurm: jobs can be previewed here (--dry-run), and submitted on a login node",
        )
        return
    if missing:
        yield SLURM.failure(
            "commands", f"{', '.join(missing)} not found", "add Slurm's folder to PATH, or install slurm-client"
        )
        return
    try:
        facts = read_facts()
    except OSError as error:
        yield SLURM.failure(
            "controller", str(error), "see `scontrol ping`; try again when it answers, or ask its people"
        )
        return
    name, version = facts.setting("ClusterName"), facts.setting("SLURM_VERSION")
    yield SLURM.ok("controller", f"cluster {name}, Slurm {version}, {len({node.name for node in facts.nodes})} nodes")
    yield _account(cluster, facts)
    if cluster.reservation:
        yield _reservation(cluster.reservation)
    for kind in _kinds(cluster):
        found = [*_kind(kind, cluster, facts)]
        yield from found
        if not any(check.state == "failure" for check in found):
            check = _sbatch(kind, cluster, config)
            # --test-only does not know of nodes that are down for now, of which a warning was given.
            if found and "node configuration is not available" in check.found:
                check = SLURM.skipped(kind, "sbatch cannot say whether it would start while nodes are down")
            yield check
    yield from _requeue(cluster, facts)
    yield from _signals(cluster, config, facts)
    yield _arrays(cluster, facts)
    yield _accounting(cluster, facts)


def _kinds(cluster: Cluster) -> Iterator[Kind]:
    """Each kind of job whose resources are not the same as those of one before it."""
    seen = []
    for kind in get_args(Kind):
        wanted = (cluster.resources(kind).model_dump(), cluster.gpus_of(kind), cluster.tasks_of(kind))
        if wanted not in seen:
            seen.append(wanted)
            yield kind


def _partitions(kind: Kind, cluster: Cluster, facts: SlurmFacts) -> list[str]:
    """Where a kind of job would be submitted to; empty if nothing is named and there is no default."""
    named = cluster.resources(kind).partition or cluster.partition or facts.default_partition
    return named.split(",") if named else []


# What a kind of job asks for


def _kind(kind: Kind, cluster: Cluster, facts: SlurmFacts) -> Iterator[Check]:
    """What makes it impossible; nothing if it can start."""
    partitions = _partitions(kind, cluster, facts)
    known = ", ".join(facts.partitions)
    if not partitions:
        yield SLURM.failure(kind, "no partition is named, and this cluster has no default", f"set `partition`: {known}")
    for name in partitions:
        if name not in facts.partitions:
            yield SLURM.failure(kind, f"there is no partition {name!r} on this cluster", f"set `partition`: {known}")
    qos = cluster.resources(kind).qos or cluster.qos
    if qos:
        yield from _qos(kind, qos, cluster, facts)
    there = [name for name in partitions if name in facts.partitions]
    yield from _in_one_of(there, kind, cluster, facts)


class _Fault(NamedTuple):
    """Why a partition cannot serve a kind of job."""

    found: str
    remedy: str
    is_limit: bool
    """One that EnforcePartLimits is about; with ALL, jobs must keep it in every partition that they name."""


def _in_one_of(partitions: list[str], kind: Kind, cluster: Cluster, facts: SlurmFacts) -> Iterator[Check]:
    """A job runs in one of its partitions: it is enough if that one can serve it."""
    faults = {
        name: [*_limits(kind, name, cluster, facts), *_too_few(kind, name, cluster, facts)] for name in partitions
    }
    fitting = [name for name in partitions if not faults[name]]
    for name, wrong in faults.items():
        if not fitting:
            for fault in wrong:
                yield SLURM.failure(kind, fault.found, fault.remedy)
            continue
        refused = [fault for fault in wrong if fault.is_limit and facts.setting("EnforcePartLimits") == "ALL"]
        for fault in refused:
            found = f"{fault.found}; {', '.join(fitting)} would do, but here jobs must fit all (EnforcePartLimits=ALL)"
            yield SLURM.failure(kind, found, f"leave {name} out of `partition`, or {fault.remedy}")
        if wrong and not refused:
            found = f"{'; '.join(fault.found for fault in wrong)}; jobs start in {', '.join(fitting)} only"
            remedies = "; ".join(fault.remedy for fault in wrong)
            yield SLURM.warning(kind, found, f"leave {name} out of `partition`, or {remedies}")
    if fitting:
        yield from _down(kind, fitting, cluster, facts)


def _limits(kind: Kind, name: str, cluster: Cluster, facts: SlurmFacts) -> Iterator[_Fault]:
    fields, wanted = facts.partitions[name], cluster.resources(kind)
    if fields.get("State", "UP") != "UP":
        yield _Fault(f"partition {name} is {fields['State']}", "wait, or set another `partition`", False)
    longest = fields.get("MaxTime", "UNLIMITED")
    if longest not in _UNLIMITED and seconds_of(wanted.time) > seconds_of(longest):
        found = f"{kind}.time is {wanted.time}, and partition {name} allows {longest}"
        yield _Fault(found, f"set {kind}.time: '{longest}'; what is not finished goes on in the next job", True)
    most = fields.get("MaxNodes", "UNLIMITED")
    if most not in _UNLIMITED and wanted.nodes > int(most):
        found = f"{kind}.nodes is {wanted.nodes}, and partition {name} allows {most}"
        yield _Fault(found, f"set {kind}.nodes: {most}", True)
    for key, value in {"Accounts": cluster.account, "Qos": wanted.qos or cluster.qos}.items():
        allowed, denied = fields.get(f"Allow{key}", "ALL"), fields.get(f"Deny{key}", "")
        what = key.lower().removesuffix("s") if key == "Accounts" else "qos"
        if value and ((allowed != "ALL" and value not in allowed.split(",")) or value in denied.split(",")):
            remedy = f"set `{what}`: {allowed}" if allowed != "ALL" else f"set another `{what}` or `partition`"
            yield _Fault(f"partition {name} does not take {what} {value!r}", remedy, True)


def _qos(kind: Kind, qos: str, cluster: Cluster, facts: SlurmFacts) -> Iterator[Check]:
    if facts.qos is None:
        return
    if qos not in facts.qos:
        known = ", ".join(facts.qos) or "none"
        yield SLURM.failure(kind, f"there is no qos {qos!r} on this cluster", f"set `qos`: {known}, or leave it out")
        return
    mine = {name for found in facts.associations or [] for name in found.qos}
    if facts.enforces("qos") and mine and qos not in mine:
        yield SLURM.failure(kind, f"you may not use qos {qos!r}", f"set `qos`: {', '.join(sorted(mine))}")
    longest, time = facts.qos[qos].get("MaxWall", ""), cluster.resources(kind).time
    if longest and seconds_of(time) > seconds_of(longest):
        yield SLURM.failure(
            kind, f"{kind}.time is {time}, and qos {qos} allows {longest}", f"set {kind}.time: '{longest}'"
        )


def _too_few(kind: Kind, name: str, cluster: Cluster, facts: SlurmFacts) -> Iterator[_Fault]:
    """Whether a partition has enough nodes that are large enough, up or not."""
    wanted = cluster.resources(kind)
    there = [node for node in facts.nodes if node.partition == name]
    lacks = {node.name: lack for node in there if (lack := _lacks(node, kind, cluster))}
    fitting = len(there) - len(lacks)
    if fitting < wanted.nodes:
        reasons = ", ".join(f"{node} {lack}" for node, lack in list(lacks.items())[:3]) or "it has no more"
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        yield _Fault(
            f"{kind} wants {wanted.nodes} node(s), and {fitting} of the {len(there)} of partition {name} can ever "
            f"serve: {reasons}{more}",
            f"change {kind}, gpus_per_node, gpu_type or constraint to what `sinfo -N -o '%N %R %G %c %m %f'` shows, or "
            "set another `partition`",
            len(there) < wanted.nodes,
        )


def _down(kind: Kind, partitions: list[str], cluster: Cluster, facts: SlurmFacts) -> Iterator[Check]:
    """Whether one of the partitions, each of which has the nodes, has enough of them up."""
    wanted, best, states = cluster.resources(kind).nodes, -1, ""
    for name in partitions:
        fitting = [node for node in facts.nodes if node.partition == name and not _lacks(node, kind, cluster)]
        if (up := sum(node.is_up for node in fitting)) > best:
            best = up
            states = ", ".join(f"{node.name} is {node.state}" for node in fitting if not node.is_up)
    if best < wanted:
        yield SLURM.warning(kind, f"{best} of the {wanted} node(s) wanted are up: {states}", "jobs wait for them")


def _lacks(node: Node, kind: Kind, cluster: Cluster) -> str:
    wanted, gpus = cluster.resources(kind), cluster.gpus_of(kind)
    cpus = cluster.tasks_of(kind) * (wanted.cpus_per_task or 1)
    found = node.gpus_of(cluster.gpu_type)
    if gpus > found and cluster.gpu_option != "none":
        return f"has {found} GPU(s){f' of type {cluster.gpu_type}' if cluster.gpu_type else ''}"
    if cpus > node.cpus:
        return f"has {node.cpus} CPU(s), not {cpus}"
    if wanted.memory and megabytes_of(wanted.memory) > node.megabytes:
        return f"has {node.megabytes} MB, not {wanted.memory}"
    constraint = wanted.constraint or cluster.constraint
    if constraint and not _has_features(node, constraint):
        return f"has the features {', '.join(sorted(node.features)) or '(none)'}, not {constraint}"
    return ""


def _has_features(node: Node, constraint: str) -> bool:
    """Of `a`, `a&b` and `a|b`; what is more involved is left to sbatch."""
    if re.search(r"[()\[\]*:]", constraint) or ("&" in constraint and "|" in constraint):
        return True
    either = "|" in constraint
    names = re.split(r"[&|,]", constraint)
    return (any if either else all)(name in node.features for name in names)


def _sbatch(kind: Kind, cluster: Cluster, config: RunConfig | None) -> Check:
    """What sbatch itself says to the script, as it would be submitted."""
    run_dir = Path(config.run_dir if config else "run").absolute()
    with tempfile.TemporaryDirectory(prefix="grasp-dist-doctor-") as folder:
        try:
            place = Place(Path(folder), Path.cwd(), run_dir, os.environ.get("SLURM_CONF"))
            text = render(Job(kind, "report", ("report",), kind), cluster, place)
        except InputError as error:
            return SLURM.failure(kind, str(error), "choose another run_dir or working directory")
        script = Path(folder) / "job.sbatch"
        script.write_text(text)
        code, out, said = ask("sbatch", "--test-only", str(script))
    if code:
        refused = said.replace("allocation failure: ", "").replace("sbatch: error: ", "")
        return SLURM.failure(
            kind, f"sbatch refuses it: {refused or out.strip()}",
            "compare the #SBATCH lines of `grasp-dist launch --dry-run` with `sinfo` and `scontrol show partition`",
        )  # fmt: skip
    start = re.search(r"to start at (\S+) using (.*)", said)
    return SLURM.ok(kind, f"sbatch takes it; it could start at {start[1]}, {start[2]}" if start else "sbatch takes it")


# The cluster file as a whole


def _account(cluster: Cluster, facts: SlurmFacts) -> Check:
    if facts.associations is None:
        return SLURM.skipped("account", "this cluster keeps no accounts, or does not show them")
    mine = sorted({found.account for found in facts.associations})
    enforced = facts.enforces("associations")
    if cluster.account is None:
        if enforced and not mine:
            return SLURM.failure("account", "you have no account, and jobs need one here", "ask for one")
        return SLURM.ok("account", f"your default, of {', '.join(mine) or 'none'}")
    if cluster.account.lower() in mine:  # Slurm keeps them in lower case
        return SLURM.ok("account", cluster.account)
    found, remedy = f"you have no account {cluster.account!r}", f"set `account`: {', '.join(mine) or 'none is yours'}"
    if enforced:
        return SLURM.failure("account", found, remedy)
    return SLURM.warning("account", f"{found}, which this cluster does not enforce", remedy)


def _reservation(name: str) -> Check:
    code, out, said = ask("scontrol", "--oneliner", "show", "reservation", name)
    fields = dict(word.partition("=")[::2] for word in out.split())
    if code or fields.get("ReservationName") != name:
        return SLURM.failure(
            "reservation", f"there is no reservation {name!r} ({said or out.strip()})",
            "leave `reservation` out, or name one of `scontrol show reservation`",
        )  # fmt: skip
    return SLURM.ok("reservation", f"{name}, {fields.get('State', '')} until {fields.get('EndTime', '?')}")


def _requeue(cluster: Cluster, facts: SlurmFacts) -> Iterator[Check]:
    if not cluster.requeue:
        yield SLURM.skipped("requeue", "requeue: false; `grasp-dist launch` goes on by hand")
        return
    default = facts.setting("JobRequeue")
    own = "the default" if default == "1" else "not the default here, so the scripts ask for it themselves"
    yield SLURM.ok("requeue", f"{own} (JobRequeue={default})")
    if facts.setting("PreemptType") in ("", "preempt/none"):
        yield SLURM.ok("preemption", "jobs are not preempted on this cluster")
        return
    for name, (mode, _) in _preempted(cluster, facts).items():
        if "CANCEL" in mode:
            yield SLURM.warning(
                "preemption", f"jobs that are preempted in {name} are cancelled, not requeued (PreemptMode=CANCEL)",
                "`grasp-dist launch` goes on from what they saved; a partition or qos that requeues does so by itself",
            )  # fmt: skip
        elif "SUSPEND" in mode:
            yield SLURM.warning(
                "preemption", f"jobs that are preempted in {name} are suspended, and their processes lose each other",
                "use a partition or qos that requeues, or is not preempted",
            )  # fmt: skip
        else:
            yield SLURM.ok("preemption", f"{name}: {mode}")


def _preempted(cluster: Cluster, facts: SlurmFacts) -> dict[str, tuple[str, int]]:
    """{partition, or qos where that decides: (how its jobs are preempted, seconds that they have then)}."""
    found = {}
    for kind in get_args(Kind):
        if facts.setting("PreemptType") == "preempt/qos":
            name = cluster.resources(kind).qos or cluster.qos or "normal"  # Slurm's default
            fields = (facts.qos or {}).get(name, {})
            mode, grace = fields.get("PreemptMode", "cluster").upper(), fields.get("GraceTime", "")
            mode = facts.setting("PreemptMode") if mode == "CLUSTER" else mode
            found[f"qos {name}"] = (mode, 0 if grace in _UNLIMITED else seconds_of(grace))
            continue
        for name in _partitions(kind, cluster, facts):
            if fields := facts.partitions.get(name, {}):
                found[name] = (fields.get("PreemptMode", "OFF"), int(fields.get("GraceTime", "0")))
    return found


def _signals(cluster: Cluster, config: RunConfig | None, facts: SlurmFacts) -> Iterator[Check]:
    """Whether a job that must stop is told, and has the time to save that it was promised."""
    wait, lead = facts.setting("KillWait"), cluster.lead_seconds
    try:
        if config:
            check_lead(config, cluster)
        yield SLURM.ok("time limit", f"asked to save {lead} s before it (up to 60 s earlier); SIGKILL {wait} after it")
    except InputError as error:
        yield SLURM.failure("time limit", str(error), "raise lead_seconds")
    if facts.setting("PreemptType") in ("", "preempt/none"):
        return
    told = facts.setting("SlurmctldParameters") + facts.setting("PreemptParameters")
    if "send_user_signal" not in told:
        remedy = "ask for PreemptParameters=send_user_signal (older: SlurmctldParameters=preempt_send_user_signal)"
        if cluster.launcher == "submitit":
            found = "a preempted job gets SIGTERM only, which submitit itself ignores"
            yield SLURM.warning("preemption signal", found, f"use launcher: sbatch, which passes it on; or {remedy}")
        else:
            yield SLURM.ok("preemption signal", "SIGTERM, which the job scripts pass on")
    else:
        yield SLURM.ok("preemption signal", "the job's own signal is sent (send_user_signal)")
    for name, (mode, grace) in _preempted(cluster, facts).items():
        if mode != "OFF" and grace < lead:
            yield SLURM.warning(
                "grace", f"a job that is preempted in {name} has {grace} s to save, not lead_seconds ({lead} s)",
                "save often (checkpoint.every), since what is trained after the last save may have to be trained again",
            )  # fmt: skip


def _arrays(cluster: Cluster, facts: SlurmFacts) -> Check:
    size = int(facts.setting("MaxArraySize") or 1001)
    if size - 1 < cluster.max_array_size:
        found = f"max_array_size is {cluster.max_array_size}, and this cluster's arrays end at {max(0, size - 1)}"
        return SLURM.failure("arrays", found, f"set max_array_size: {max(1, size - 1)}")
    return SLURM.ok("arrays", f"up to {cluster.max_array_size} elements")


def _accounting(cluster: Cluster, facts: SlurmFacts) -> Check:
    code, _, said = ask("sacct", "-nPX", "--starttime", "now")
    if facts.setting("AccountingStorageType").endswith("slurmdbd") and code == 0:
        return SLURM.ok("accounting", "sacct answers")
    found = f"sacct does not answer: {said or 'there is no database'}"
    if cluster.launcher == "submitit":
        remedy = "use launcher: sbatch; submitit waits for ever for a job that was killed without a result"
        return SLURM.failure("accounting", found, remedy)
    return SLURM.warning(
        "accounting", found, "`grasp-dist status` then goes by squeue and by what the jobs have written"
    )
