"""One writer per run directory, on a local disk, NFS or Lustre. Needs no torch.

    <folder>/.lock/<n>.json          the n-th holder: who, where, since when, held or free; its time of change is the
                                     heartbeat
    <folder>/.lock/<part>/<n>.json   the same for one part of the run; parts may be held beside each other

The file with the largest n is the lock. Whoever finds it free, or its holder gone, tries to create n + 1. The file
system lets exactly one succeed (`O_CREAT | O_EXCL`, which NFS since version 3 and Lustre keep across machines), and
that one removes the older files. The last file stays, so the count never falls, and a process that was asleep between
looking and creating cannot take what has been taken meanwhile: it finds a larger n beside its own, and gives way. A
holder that was judged gone and comes back touches only its own n.

filelock, which torch brings along, is not what excludes here. Its `FileLock` is flock: missing on Lustre without
`-o flock`, silently local to one machine with `-o localflock` and with NFS's `nolock` or `local_lock`, and kept by
forked children of a holder that was killed. Its `SoftFileLock` cannot tell whether a holder on another machine is
alive. Everything in this module is ours, on the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from grasp_dist.errors import InputError

__all__ = ["PATIENCE", "Holder", "RunLock", "await_free", "holder_of"]

PATIENCE = 120.0
"""Seconds without a heartbeat after which a holder on another machine counts as gone."""

_FOLDER = ".lock"
_SLASH = "+"
"""In the place of a slash in the name of a part's folder."""
_FILE = re.compile(r"(\d+)\.json")
_HELD, _FREE = '{"status": "held", ', '{"status": "free", '
"""How a file begins: of one length, so that letting go is a write in place, which needs no room on the disk."""
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only; choose another run_dir",
    errno.EACCES: "permission is denied; choose another run_dir or change its owner",
    errno.EPERM: "permission is denied; choose another run_dir or change its owner",
}


class RunLock:
    """`with RunLock(folder, what="training"):` makes this process the only writer of `folder`, which it creates.

    A holder that is gone is recognised, and its place taken with a printed line that says so: at once if it ran on this
    machine and its process is no more (or its id belongs to a younger one), or if it was an earlier start of this same
    Slurm job; else if its heartbeat, which a thread renews every `heartbeat` seconds, does not change while it is
    watched for `patience` seconds. No two clocks are compared.

    part: hold this task of the run only. Several parts can be held at once by as many processes, but none together
    with the whole: each looks for the other when it has its own, and gives way.

    Raises `InputError` if another process holds the folder, naming it, and if the folder cannot be written. A forked
    child does not hold its parent's lock, and leaves it alone.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        what: str,
        part: str | None = None,
        heartbeat: float = 10.0,
        patience: float = PATIENCE,
    ) -> None:
        """what: the work, as the message to a second writer names it. heartbeat, patience: seconds."""
        self._run, self._part = Path(folder), part
        self._folder = Path(folder) / _FOLDER if part is None else Path(folder) / _FOLDER / part.replace("/", _SLASH)
        self._what, self._heartbeat, self._patience = what, heartbeat, patience
        self._number = 0
        self._pid: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        if self._pid is not None:
            raise InputError(f"this lock of {self._run} is in use already; make another RunLock")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            own = Holder.here(self._what)
            self._number, left_by = self._take(own)
            self._pid = os.getpid()
            try:
                _all_free(self._others(), own)
            except BaseException:
                self.release()
                raise
        except OSError as error:
            why = _REASONS.get(error.errno or 0, f"{error.strerror or error}; choose another run_dir")
            raise InputError(f"cannot lock the run directory {self._run}: {why}") from None
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        if left_by is not None:
            print(f"{self._run} was left locked; taken over from {left_by}", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let go, if this process holds the lock. Safe to call twice."""
        if self._pid != os.getpid():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        # A file that is gone was removed by the process that took the lock from this one.
        with contextlib.suppress(OSError), self._path(self._number).open("r+b") as file:
            file.write(_FREE.encode())
        self._pid = None

    def check(self) -> None:
        """Raise `InputError` if the lock was taken from this process, or removed: it was thought dead, as after a long
        stop of its machine. For use before what must not be written by two; reads one small folder."""
        if self._pid != os.getpid():
            raise InputError(f"this process does not hold the lock of {self._run}")
        try:
            newest = max(self._numbers(), default=0)
            holder = _read(self._path(newest)).holder if newest != self._number else None
        except OSError as error:
            raise InputError(f"cannot look at the lock of the run directory {self._run}: {error.strerror}") from None
        if newest != self._number:
            now = f"in use by {holder.describe()} now" if holder else "no longer locked by this process"
            raise InputError(
                f"{self._run} is {now}: this process was silent for so long that it was thought dead. It stops, so "
                "that no two write there; what was saved before is kept"
            )

    def _others(self) -> list[RunLock]:
        """The locks that may not be held beside this one: of a part the whole's, of the whole every part's."""
        if self._part is not None:
            return [RunLock(self._run, what=self._what, patience=self._patience)]
        parts = sorted(path.name.replace(_SLASH, "/") for path in self._folder.iterdir() if path.is_dir())
        return [RunLock(self._run, what=self._what, part=part, patience=self._patience) for part in parts]

    def _take(self, own: Holder) -> tuple[int, str | None]:
        """The number that this process holds now, and who was there before if that one is gone."""
        number = 0
        while True:
            number, left_by = _until_told([self._watch(own, at_least=number)], self._patience)[0]
            number += 1
            if self._create(number, own):
                return number, left_by

    def _watch(self, own: Holder, *, at_least: int = 0) -> _Watch:
        """Look again at every step, until it is known that nobody holds the lock; returns the newest number, and who
        held it if that one is gone.

        at_least: a number that has been in use, although NFS's cache of the folder may not show it yet. Raises
        `InputError` if the holder is alive.
        """
        watched: tuple[int, int | None] | None = None
        deadline = 0.0
        while True:
            newest = max([at_least, *self._numbers()])
            holder, held, beat = _read(self._path(newest))
            if not held:
                return newest, None
            here = holder is not None and holder.same_machine(own)
            if holder is not None:
                if reason := holder.gone(own):
                    return newest, f"{holder.describe()}: {reason}"
                stirred = watched is not None and watched[0] == newest and watched[1] != beat
                # The earlier start of a requeued job, if it is still there, is about to end.
                if not holder.requeued(own) if here else stirred:
                    raise InputError(self._refusal(holder))
            sign = (newest, None if here else beat)
            if watched != sign:
                watched, deadline = sign, time.monotonic() + self._patience
                if holder is not None:
                    wait = f"waiting up to {self._patience:g} s for its end or a sign of life"
                    print(f"{self._run} is locked by {holder.describe()}; {wait}", flush=True)
            elif time.monotonic() >= deadline:
                if here and holder is not None:
                    raise InputError(self._refusal(holder))
                who = holder.describe() if holder else f"the unreadable {self._path(newest)}"
                return newest, f"{who}: no sign of life for {self._patience:g} s"
            yield

    def _create(self, number: int, own: Holder) -> bool:
        """Make this number's file; whether it is the lock now."""
        path = self._path(number)
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(_HELD + json.dumps(asdict(own)).removeprefix("{"))
            numbers = self._numbers()
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        if max(numbers, default=0) != number:
            path.unlink(missing_ok=True)
            return False
        for older in numbers:
            if older != number:
                with contextlib.suppress(OSError):
                    self._path(older).unlink()
        return True

    def _beat(self) -> None:
        path = self._path(self._number)
        while not self._stop.wait(self._heartbeat):
            # What fails now is tried again; whether the lock was lost is for `check` to say.
            with contextlib.suppress(OSError):
                os.utime(path)

    def _refusal(self, holder: Holder) -> str:
        where = f"the run directory {self._run}" if self._part is None else f"{self._part} in {self._run}"
        return (
            f"{where} is in use by {holder.describe()}; wait until that has ended, stop it "
            f"(`{holder.stop}`), or choose another run_dir. If it is certain that it runs no more, remove "
            f"{self._folder}"
        )

    def _seen(self) -> _Seen:
        """The newest number's file."""
        try:
            return _read(self._path(max(self._numbers(), default=0)))
        except OSError:
            return _Seen(None, False, None)

    def _numbers(self) -> list[int]:
        matches = map(_FILE.fullmatch, os.listdir(self._folder))  # noqa: PTH208 - in one system call
        return [int(match[1]) for match in matches if match]

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.json"


def holder_of(folder: str | os.PathLike[str], part: str | None = None) -> tuple[Holder, float] | None:
    """Who holds the run directory, or a part of it, and the seconds since its heartbeat by the clock here; None if
    nobody does, or its process is known to be gone. Looks only; does not wait."""
    seen = RunLock(folder, what="", part=part)._seen()
    if not seen.held or seen.holder is None or seen.holder.gone(Holder.here("")) is not None:
        return None
    return seen.holder, max(0.0, time.time() - (seen.beat or 0) / 1e9)


def await_free(
    folder: str | os.PathLike[str],
    *,
    what: str,
    patience: float = PATIENCE,
    ended: Callable[[Holder], bool] = lambda holder: False,
) -> None:
    """Return when no other process holds the run directory or a part of it; those that may be gone are watched beside
    each other, as `RunLock` does. Takes nothing. For a process that holds a part already, which has looked at the
    whole, only the other parts count.

    what: for which work, as `RunLock` has it. ended: whether a holder on another machine is known to have ended.
    Raises `InputError` if one is alive.
    """
    whole, own = RunLock(folder, what=what, patience=patience), Holder.here(what)
    if not whole._folder.is_dir():
        return
    parts = whole._others()
    others = [lock for lock in parts if not ((holder := lock._seen().holder) and holder.is_process(own))]
    left = []
    for lock in others if len(others) < len(parts) else [whole, *parts]:
        holder = lock._seen().holder
        if holder is None or holder.same_machine(own) or not ended(holder):
            left.append(lock)
    _all_free(left, own)


_Watch = Generator[None, None, tuple[int, "str | None"]]


def _all_free(locks: Sequence[RunLock], own: Holder) -> None:
    _until_told([lock._watch(own) for lock in locks], min((lock._patience for lock in locks), default=0.0))


def _until_told(watches: Sequence[_Watch], patience: float) -> list[tuple[int, str | None]]:
    """What each watch comes to, taken step by step beside each other."""
    told: dict[int, tuple[int, str | None]] = {}
    while True:
        for number, watch in enumerate(watches):
            if number not in told:
                try:
                    next(watch)
                except StopIteration as end:
                    told[number] = end.value
        if len(told) == len(watches):
            return [told[number] for number in range(len(watches))]
        time.sleep(min(0.2, patience / 4))


@dataclass(frozen=True)
class Holder:
    """A process, so that it can be named to a person and told apart from every other one."""

    what: str
    command: str
    user: str
    since: str
    host: str
    machine: str
    """Host name, boot, and namespace of process ids: equal only where process ids mean the same."""
    pid: int
    started: str | None
    """When the process began, on its machine's own scale; None where that cannot be known."""
    slurm_job: str | None
    slurm_cluster: str | None
    slurm_restart: int

    @classmethod
    def here(cls, what: str) -> Holder:
        """This process."""
        host = platform.node()
        try:
            user = getpass.getuser()
        except (OSError, KeyError):  # in a container, an id without a name
            user = f"user {os.getuid()}"
        return cls(
            what=what,
            command=" ".join(" ".join(sys.orig_argv).split())[:300],
            user=user,
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            host=host,
            machine=f"{host} {_boot()} {_namespace()}",
            pid=os.getpid(),
            started=_process(os.getpid())[1],
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            slurm_cluster=os.environ.get("SLURM_CLUSTER_NAME"),
            slurm_restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def describe(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return (
            f"{self.what} of {self.user} (pid {self.pid} on {self.host}{job}, since {self.since}, started as "
            f"`{self.command}`)"
        )

    @property
    def stop(self) -> str:
        """The command that ends it."""
        return f"scancel {self.slurm_job}" if self.slurm_job else f"kill {self.pid}"

    def same_machine(self, own: Holder) -> bool:
        return self.machine == own.machine

    def is_process(self, own: Holder) -> bool:
        return (self.machine, self.pid, self.started) == (own.machine, own.pid, own.started)

    def requeued(self, own: Holder) -> bool:
        """Whether it was another start of the Slurm job that the process `own` belongs to."""
        same = (self.slurm_cluster, self.slurm_job) == (own.slurm_cluster, own.slurm_job)
        return self.slurm_job is not None and same and self.slurm_restart != own.slurm_restart

    def gone(self, own: Holder) -> str | None:
        """Why it cannot be alive, as seen from the process `own`; None if that cannot be told."""
        if not self.same_machine(own):
            return "its Slurm job was requeued, and is this one" if self.requeued(own) else None
        alive, started = _process(self.pid)
        if not alive:
            return "the process is gone"
        if None not in (started, self.started) and started != self.started:
            return "the process is gone, and its id is another one's now"
        return None


class _Seen(NamedTuple):
    """What a number's file says now."""

    holder: Holder | None
    """None: not written to its end yet, or damaged, or free, or there is no file."""
    held: bool
    beat: int | None
    """Time of change, in ns."""


def _read(path: Path) -> _Seen:
    try:
        # Opened, not only looked at, so that NFS asks the server how the file is now.
        with path.open("rb") as file:
            content, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return _Seen(None, False, None)
        raise
    if content.startswith(_FREE.encode()):
        return _Seen(None, False, beat)
    try:
        found = json.loads(content)
        return _Seen(Holder(**{field.name: found[field.name] for field in fields(Holder)}), True, beat)
    except (ValueError, TypeError, KeyError):
        return _Seen(None, True, beat)


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    # Containers may share a host name and each count their processes from 1.
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _process(pid: int) -> tuple[bool, str | None]:
    """Whether the process runs on this machine (one that only waits to be reaped does not), and when it began."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False, None
    except PermissionError:
        pass
    if not Path("/proc/self/stat").exists():
        return _asked_of_ps(pid)
    try:
        # The name, in brackets, may hold anything; state and start time are the 1st and 20th field behind it.
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return state not in "ZX", rest[18]
    except (OSError, ValueError, IndexError):
        return True, None  # of another user, where /proc shows each only their own; or gone this very moment


def _asked_of_ps(pid: int) -> tuple[bool, str | None]:
    """The same where there is no /proc, as on macOS."""
    command = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except OSError:
        return True, None
    state, _, started = found.stdout.strip().partition(" ")
    return bool(state) and not state.startswith("Z"), started.strip() or None
