"""A real Slurm of two nodes on this machine, without systemd: started in about two seconds, and gone without a trace.

Each node is a slurmd in namespaces of its own (host name, mounts), so that the nodes have names that resolve for them
alone, and so that everything that ever ran on one is found again: by its mount namespace. Killing all of that is a node
that loses its power. The settings are those that were measured to work: fast scheduling, requeued jobs back in seconds.

    with SlurmCluster() as slurm:
        slurm.run("srun", "-N2", "hostname")
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

NODES = ("node1", "node2")
CPUS = 4
GPUS = 2
"""Per node, and fake: character devices that nothing opens."""
_DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare", "setpriv")
_DATABASE = ("slurmdbd", "mariadbd")
_PATIENCE = 3
"""How many times slower than the one on which they were measured a machine may be before a timeout is over."""
TERMINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL"}


def missing() -> str | None:
    """Why a Slurm cannot be started here, for a test to skip with; None if it can."""
    absent = [name for name in _DAEMONS if _which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge)"
    if os.geteuid() != 0:
        return "needs root, for the nodes' namespaces"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False).returncode:
        return "needs `unshare --uts --mount`"
    return None


class SlurmCluster:
    """`with SlurmCluster() as slurm:`; `env` is the environment of commands that are to reach it."""

    def __init__(self, *, accounting: bool = True, slurmd_timeout: int = 5) -> None:
        """accounting: with slurmdbd, so that `sacct` answers, where it is installed. slurmd_timeout: seconds of silence
        after which a node counts as down, rounded up to Slurm's own rhythm (5: about 15)."""
        self.accounting = accounting and all(_which(name) for name in _DATABASE)
        self._slurmd_timeout = slurmd_timeout
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._spaces: set[str] = set()

    def __enter__(self) -> SlurmCluster:
        fast = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir=fast if os.access(fast, os.W_OK) else None))
        self.root.chmod(0o755)
        # SLURM_CONF is dropped inside steps, and the scripts call scontrol there.
        self.env = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}
        for name in [name for name in self.env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.env[name]
        try:
            self._write_files()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the jobs, whatever is left of them, and the daemons; remove the folder."""
        for space in self._spaces:
            _kill_all(space)
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    # What tests do with it

    def run(self, *command: object, check: bool = True, timeout: float = 60, **more: object) -> str:
        """Standard output of a command, stripped. AssertionError with what it said if it fails and `check` is set."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.env, capture_output=True, text=True, timeout=timeout, check=False, **more,  # type: ignore[call-overload]
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: {"JobState": "RUNNING", "Restarts": "0", ...}; empty for an unknown job."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job_id, check=False).splitlines()
        return dict(word.partition("=")[::2] for word in shown[0].split(" ") if "=" in word) if shown else {}

    def state(self, job_id: str) -> str:
        return self.job(job_id).get("JobState", "UNKNOWN")

    def queue(self) -> dict[str, str]:
        """{job id: state} of every job that has not ended, array elements one by one."""
        return dict(line.split() for line in self.run("squeue", "-hr", "-o", "%i %T").splitlines())

    def wait(self, job_id: str, *states: str, timeout: float = 120) -> str:
        """Poll until the job is in one of the states (default: it has ended); returns it."""
        wanted = set(states) or TERMINAL
        self.until(lambda: self.state(job_id) in wanted, timeout, lambda: f"job {job_id}: {self.job(job_id)}")
        return self.state(job_id)

    def wait_empty(self, timeout: float = 300) -> None:
        """Until no job is queued or running."""
        self.until(lambda: not self.queue(), timeout, lambda: self.run("squeue", "-r", "-o", "%i %j %T %r %E"))

    def until(self, done: Callable[[], object], timeout: float, say: Callable[[], str] = lambda: "") -> None:
        """Poll until `done()`; AssertionError with `say()` after `timeout` seconds, or more on a slow machine."""
        timeout *= _PATIENCE
        deadline = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < deadline, f"not within {timeout:g} s; {say()}"
            time.sleep(0.05)

    def clear(self) -> None:
        """Cancel every job, and bring every node back."""
        self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        self.run("scancel", "--user=root", check=False)
        for space in self._spaces:
            _kill_all(space, keep=("slurmd",))
        for node in NODES:
            if f"slurmd {node}" not in self._daemons:
                self.start_node(node)
            if "drain" in self.run("sinfo", "-hn", node, "-p", "main", "-o", "%T", check=False):
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self._await_idle()

    def kill_node(self, node: str) -> None:
        """The node loses its power: slurmd and every process that it started are gone at once."""
        daemon = self._daemons.pop(f"slurmd {node}")
        space = _space(daemon.pid)
        _kill_all(space)
        daemon.wait()
        self._spaces.discard(space)

    def start_node(self, node: str) -> None:
        """Switch it on (again)."""
        name = f"slurmd {node}"
        inside = f'hostname {node} && mount --bind "$0" /etc/hosts && exec slurmd -D -N {node}'
        self._launch(name, "unshare", "--uts", "--mount", "sh", "-c", inside, str(self.root / "hosts"))
        own = _space(os.getpid())
        self.until(lambda: _space(self._daemons[name].pid) not in ("", own), 10)
        self._spaces.add(_space(self._daemons[name].pid))

    def restart_controller(self, job_id: str) -> None:
        """Kill slurmctld, and start it again, when the job's state is on the disk: that takes it some seconds. A job
        whose start it had forgotten would be started twice."""
        changed = time.time()
        self.run("scontrol", "update", f"jobid={job_id}", "comment=saved")
        self.until(lambda: (self.root / "state" / "job_state").stat().st_mtime > changed, 30)
        self._daemons["slurmctld"].kill()
        self._daemons["slurmctld"].wait()
        self._launch("slurmctld", "slurmctld", "-D")
        self.until(lambda: "UP" in self.run("scontrol", "ping", check=False), 30, lambda: self._said("slurmctld"))

    # Inside

    def _write_files(self) -> None:
        root = self.root
        for name in ("munge", "state", "log", "spool", "dev", "db"):
            (root / name).mkdir()
        key = root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = "".join(f"127.0.0.1 {node}\n" for node in NODES)
        (root / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n{names}")
        host, port = socket.gethostname(), _free_ports(2 + len(NODES))
        gpus = self._fake_gpus()
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={port}",
            "SlurmUser=root",
            "SlurmdUser=root",
            # Ports of jobs follow from their numbers, and another such cluster may be on this machine.
            f"FirstJobId={secrets.randbelow(50_000) + 1}",
            # 5 s, so that a requeued job does not wait for 2 minutes.
            f"AuthInfo=socket={root}/munge/sock,cred_expire=5",
            f"StateSaveLocation={root}/state",
            f"SlurmctldPidFile={root}/slurmctld.pid",
            f"SlurmctldLogFile={root}/log/slurmctld.log",
            f"SlurmdPidFile={root}/slurmd-%n.pid",
            f"SlurmdLogFile={root}/log/slurmd-%n.log",
            f"SlurmdSpoolDir={root}/spool/%n",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0",
            "ReturnToService=2",
            "MailProg=/bin/true",
            f"SlurmdTimeout={self._slurmd_timeout}",
            "MessageTimeout=5",
            "KillWait=1",
            "KillOnBadExit=1",  # as many clusters have it
            "MinJobAge=86400",
            "SlurmdParameters=config_overrides",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SlurmctldParameters=preempt_send_user_signal",
            *(["GresTypes=gpu"] if gpus else []),
            *self._accounting(port + 1),
            f"NodeName=DEFAULT CPUs={CPUS} RealMemory=4000" + (f" Gres=gpu:{GPUS}" if gpus else ""),
            *(
                f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port + 2 + number}"
                for number, node in enumerate(NODES)
            ),
            "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20",
            "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF",
        ]
        (root / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _fake_gpus(self) -> bool:
        try:
            for number in range(GPUS):
                os.mknod(self.root / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        except OSError:
            return False
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/dev/gpu[0-{GPUS - 1}]\n")
        return True

    def _accounting(self, port: int) -> list[str]:
        if not self.accounting:
            return []
        root = self.root
        lines = [
            "AuthType=auth/munge",
            f"AuthInfo=socket={root}/munge/sock",
            "DbdHost=localhost",
            f"DbdPort={port}",
            "SlurmUser=root",
            f"LogFile={root}/log/slurmdbd.log",
            f"PidFile={root}/slurmdbd.pid",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=root",
            "StorageLoc=slurm_acct",
        ]
        conf = root / "slurmdbd.conf"
        conf.write_text("\n".join(lines) + "\n")
        conf.chmod(0o600)
        return [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=localhost",
            f"AccountingStoragePort={port}",
            f"AccountingStoragePass={root}/munge/sock",
            "JobAcctGatherType=jobacct_gather/none",
        ]

    def _start(self) -> None:
        root, munge = self.root, self.root / "munge"
        if self.accounting:
            self._launch_database()
        self._launch(
            "munged", "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/sock",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self.until((munge / "sock").exists, 10, lambda: self._said("munged"))
        if self.accounting:
            self._launch("slurmdbd", "slurmdbd", "-D")
            answers = ["sacctmgr", "-n", "show", "cluster"]
            self.until(
                lambda: subprocess.run(answers, env=self.env, capture_output=True, check=False).returncode == 0,
                30,
                lambda: self._said("slurmdbd"),
            )
        self._launch("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self._await_idle()
        assert root.exists()

    def _launch_database(self) -> None:
        """MariaDB without its own tables of users, reached by a socket that only root sees."""
        folder = self.root / "db"
        (folder / "data" / "mysql").mkdir(parents=True)
        folder.chmod(0o700)
        self._launch(
            "mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}/data",
            f"--socket={folder}/sock", "--skip-networking", "--skip-grant-tables", f"--pid-file={folder}/pid",
            "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin",
        )  # fmt: skip
        self.until((folder / "sock").exists, 30, lambda: self._said("mariadbd"))

    def _launch(self, name: str, *command: str) -> None:
        """A daemon in the foreground, which ends with this process whatever ends it."""
        log = self.root / "log" / f"{name.replace(' ', '-')}.out"
        with log.open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env={
                    **self.env,
                    "PATH": f"/usr/sbin:/sbin:{os.environ['PATH']}",
                    "MYSQL_UNIX_PORT": f"{self.root}/db/sock",
                },
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.root, start_new_session=True,
            )  # fmt: skip

    def _said(self, name: str) -> str:
        return "\n".join(
            "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted((self.root / "log").glob(f"{name}*"))
        )

    def _await_idle(self) -> None:
        # Compared exactly: `sinfo -t idle` also finds nodes in the state `unknown*`.
        wanted = {f"{node} idle" for node in NODES}

        def idle() -> bool:
            return set(self.run("sinfo", "-hN", "-p", "main", "-o", "%N %T", check=False).splitlines()) == wanted

        self.until(idle, 60, lambda: self.run("sinfo", "-N", "-o", "%N %T %E", check=False) + self._said("slurm"))


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on, below the range that outgoing connections take."""
    start = 10_000 + secrets.randbelow(5_000)  # jobs take ports above 20000
    for first in range(start, start + 4_000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


def _space(pid: int) -> str:
    """The process' mount namespace; empty for one that is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    except OSError:
        return ""


def _members(space: str, keep: Iterable[str] = ()) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and space and _space(int(entry.name)) == space:
            with contextlib.suppress(OSError):
                if (entry / "comm").read_text().strip() not in keep:
                    found.append(int(entry.name))
    return found


def _kill_all(space: str, keep: Iterable[str] = ()) -> None:
    """Every process of a mount namespace, also those that are started meanwhile. Zombies have no namespace to read."""
    for _ in range(100):
        if not (pids := _members(space, keep)):
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == "__main__":
    with SlurmCluster() as cluster:
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdin.read()
