"""The lock of a run directory: real processes, killed, stopped, forked and racing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from grasp_dist.errors import InputError
from grasp_dist.run_lock import Holder, RunLock, _asked_of_ps, _process, await_free, holder_of
from tests.forks import CONTEXT

HOLD = """
import os, platform, sys, time
from grasp_dist.run_lock import RunLock
folder, host, beat, then = sys.argv[1:]
if host:
    platform.node = lambda: host
with RunLock(folder, what="training", heartbeat=float(beat)) as lock:
    print("held", flush=True)
    exec(then)
"""
"""A process that takes the lock, as on the machine `host` if that is given, and then does what it is told."""
FOREVER = "time.sleep(600)"
DIE = "os.kill(os.getpid(), 9)"


def hold(folder: Path, *, host: str = "", beat: float = 0.05, then: str = FOREVER, **env: str) -> subprocess.Popen[str]:
    """Start a holder and return when it has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), host, str(beat), then],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait(30)
    if process.stdout:
        process.stdout.close()


def leave(folder: Path, *, host: str = "", **env: str) -> None:
    """A lock whose holder was killed and reaped."""
    end(hold(folder, host=host, then=DIE, **env))


def leave_elsewhere(folder: Path, part: str = "", *, silent: float = 0.0, slurm_job: str | None = None) -> Path:
    """The same on another machine, whose process cannot be seen from here, `silent` seconds ago; returns its file."""
    holder = replace(Holder.here("training"), host="elsewhere", machine="elsewhere", slurm_job=slurm_job)
    path = folder / ".lock" / part.replace("/", "+") / "1.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"status": "held", **asdict(holder)}))
    os.utime(path, (time.time() - silent,) * 2)
    return path


def record(folder: Path) -> Path:
    (path,) = (folder / ".lock").iterdir()
    return path


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen[str]]:
    process = hold(tmp_path)
    yield process
    end(process)


def test_a_second_writer_is_told_who_holds_the_directory(tmp_path, holder):
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        RunLock(tmp_path, what="detection").__enter__()
    assert time.monotonic() - started < 10  # at once, not after the minute that a silent holder has
    message = str(caught.value)
    saved = json.loads(record(tmp_path).read_text())
    for part in (str(tmp_path), "training of", f"pid {holder.pid} on {saved['host']}", saved["since"], "run_lock"):
        assert part in message
    assert f"`kill {holder.pid}`" in message
    assert "another run_dir" in message
    assert holder.poll() is None


def test_a_released_lock_is_free_and_says_nothing(tmp_path, capsys):
    for _ in range(3):
        with RunLock(tmp_path, what="training") as lock:
            lock.check()
        lock.release()
    with pytest.raises(InputError, match="does not hold"):
        lock.check()
    with RunLock(tmp_path / "new" / "folder", what="training"):
        assert (tmp_path / "new" / "folder").is_dir()
    assert capsys.readouterr().out == ""
    assert len(list((tmp_path / ".lock").iterdir())) == 1


def test_an_exception_releases(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path, what="training"):
        1 / 0  # noqa: B018
    with RunLock(tmp_path, what="training"):
        pass


def test_a_killed_holder_is_replaced_at_once_with_a_line(tmp_path, capsys):
    leave(tmp_path)
    pid = json.loads(record(tmp_path).read_text())["pid"]
    with RunLock(tmp_path, what="training"):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{tmp_path} was left locked; taken over from training of" in line
    assert f"pid {pid} on" in line
    assert line.endswith("the process is gone")


def test_a_holder_that_waits_to_be_reaped_is_dead(tmp_path):
    process = hold(tmp_path, then=DIE)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    os.kill(process.pid, 0)  # a zombie answers
    with RunLock(tmp_path, what="training"):
        pass
    end(process)


def test_a_stopped_holder_is_alive(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="is in use by"):
        RunLock(tmp_path, what="training", patience=0.2).__enter__()


def test_a_process_id_that_was_used_again_is_not_the_holder(tmp_path, capsys):
    leave(tmp_path)
    saved = json.loads(record(tmp_path).read_text())
    record(tmp_path).write_text(json.dumps({**saved, "pid": os.getpid()}))
    with RunLock(tmp_path, what="training"):
        assert "its id is another one's now" in capsys.readouterr().out
    record(tmp_path).write_text(json.dumps({**saved, "pid": os.getpid(), "started": _process(os.getpid())[1]}))
    with pytest.raises(InputError, match=f"pid {os.getpid()} on"):
        RunLock(tmp_path, what="training").__enter__()


def test_a_requeued_slurm_job_takes_its_own_lock_over(tmp_path, capsys, monkeypatch):
    leave(tmp_path, host="node7", SLURM_JOB_ID="41", SLURM_CLUSTER_NAME="c")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    started = time.monotonic()
    with RunLock(tmp_path, what="training"):
        assert time.monotonic() - started < 10  # as above
        out = capsys.readouterr().out
        assert "on node7, Slurm job 41" in out
        assert out.endswith("its Slurm job was requeued, and is this one\n")


def test_the_earlier_start_of_a_requeued_job_may_take_its_time_to_end(tmp_path, monkeypatch):
    process = hold(tmp_path, then="time.sleep(1)", SLURM_JOB_ID="41")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(InputError, match="`scancel 41`"):
        RunLock(tmp_path, what="training", patience=0.2).__enter__()
    with RunLock(tmp_path, what="training", patience=20):
        assert process.wait(5) == 0


@pytest.mark.parametrize("variables", [{"SLURM_JOB_ID": "42"}, {"SLURM_CLUSTER_NAME": "d"}])
def test_another_slurm_job_is_judged_by_its_heartbeat(tmp_path, monkeypatch, variables):
    job = {"SLURM_JOB_ID": "41", "SLURM_CLUSTER_NAME": "c"}
    process = hold(tmp_path, host="node7", **{**job, **variables})
    for name, value in {**job, "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="on node7, Slurm job"):
        RunLock(tmp_path, what="training", patience=30).__enter__()
    end(process)


@pytest.mark.parametrize("clock", [0, 2**40])
def test_another_machine_is_judged_by_its_heartbeat_whatever_its_clock_says(tmp_path, capsys, clock):
    process = hold(tmp_path, host="node7", beat=0.3)
    os.utime(record(tmp_path), (clock, clock))
    started = time.monotonic()
    with pytest.raises(InputError, match="on node7"):
        RunLock(tmp_path, what="training", patience=60).__enter__()
    assert time.monotonic() - started < 30  # at the first sign of life
    end(process)
    os.utime(record(tmp_path), (clock, clock))
    capsys.readouterr()
    started = time.monotonic()
    with RunLock(tmp_path, what="training", patience=0.5):
        assert time.monotonic() - started >= 0.5
    first, last = capsys.readouterr().out.splitlines()
    assert "waiting up to 0.5 s" in first
    assert last.endswith("no sign of life for 0.5 s")


def test_a_lock_that_is_let_go_while_it_is_watched_is_taken(tmp_path, capsys):
    process = hold(tmp_path, host="node7", beat=600, then="time.sleep(0.6)")
    with RunLock(tmp_path, what="training", patience=60):
        pass
    assert process.wait(5) == 0
    assert "taken over" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", '{"status": "held", "what": "trai', "[]", "\0\0\0"])
def test_an_unfinished_or_damaged_file_is_waited_for(tmp_path, content):
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "1.json").write_text(content)
    started = time.monotonic()
    with RunLock(tmp_path, what="training", patience=0.4):
        assert time.monotonic() - started >= 0.4
        assert record(tmp_path).name == "2.json"


def test_a_lost_lock_is_noticed_and_the_new_holder_left_alone(tmp_path):
    """A machine that was stopped for longer than the other's patience wakes up again."""
    first = RunLock(tmp_path, what="training", heartbeat=600)
    with first:
        saved = record(tmp_path).read_text()
        record(tmp_path).write_text(saved.replace('"machine": "', '"machine": "another '))
        with RunLock(tmp_path, what="detection", patience=0.1) as second:
            with pytest.raises(InputError, match=r"in use by detection of .* now: this process was silent"):
                first.check()
            first.release()
            second.check()
            with pytest.raises(InputError, match="in use by detection"):
                RunLock(tmp_path, what="training").__enter__()


def test_a_removed_lock_is_noticed(tmp_path):
    with RunLock(tmp_path, what="training") as lock:
        record(tmp_path).unlink()
        with pytest.raises(InputError, match="no longer locked by this process"):
            lock.check()


def test_a_forked_child_neither_releases_nor_keeps_the_lock(tmp_path):
    fork = "child = os.fork()\nif child == 0: sys.exit()\nos.waitpid(child, 0)\nprint('forked', flush=True)\n"
    process = hold(tmp_path, then=fork + FOREVER)
    assert process.stdout is not None
    assert process.stdout.readline() == "forked\n"
    with pytest.raises(InputError, match=f"pid {process.pid} on"):
        RunLock(tmp_path, what="training").__enter__()
    end(process)
    orphan = hold(
        tmp_path / "other", then=f"child = os.fork()\nif child:\n  print(child, flush=True)\n  {DIE}\n{FOREVER}"
    )
    assert orphan.stdout is not None
    child = int(orphan.stdout.readline())
    orphan.wait(30)
    os.kill(child, 0)
    with RunLock(tmp_path / "other", what="training"):
        os.kill(child, signal.SIGKILL)
    orphan.stdout.close()


def _race(folder: Path, rounds: int, before, after, wins) -> None:
    for number in range(rounds):
        before.wait(60)
        try:
            with RunLock(folder / str(number), what="training"):
                wins.put((number, os.getpid()))
                after.wait(60)
        except InputError:
            after.wait(60)


def test_of_many_that_find_a_stale_lock_exactly_one_takes_it(tmp_path):
    rounds, processes = 40, 8
    leave(tmp_path / "stale")
    content = record(tmp_path / "stale").read_bytes()
    for number in range(rounds):
        (tmp_path / str(number) / ".lock").mkdir(parents=True)
        (tmp_path / str(number) / ".lock" / "1.json").write_bytes(content)
    before, after, wins = CONTEXT.Barrier(processes), CONTEXT.Barrier(processes), CONTEXT.SimpleQueue()
    arguments = (tmp_path, rounds, before, after, wins)
    workers = [CONTEXT.Process(target=_race, args=arguments, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    won = [wins.get() for _ in range(rounds)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(number for number, _ in won) == list(range(rounds))
    assert wins.empty()
    assert len({pid for _, pid in won}) > 1


def _come_and_go(folder: Path, seed: int) -> None:
    generator = random.Random(seed)
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while not (folder / "enough").exists():
        try:
            with RunLock(folder / "run", what="training"):
                os.write(log, f"in {os.getpid()}\n".encode())
                time.sleep(generator.random() * 0.002)
                if generator.random() < 0.1:
                    os.write(log, f"out {os.getpid()}\n".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                os.write(log, f"out {os.getpid()}\n".encode())
        except InputError:
            pass


def test_never_two_at_once_while_processes_come_go_and_are_killed(tmp_path):
    began = time.monotonic()
    workers: list = []
    started = killed = 0
    log = tmp_path / "log"
    log.touch()
    while killed <= 5 or log.read_text().count("in ") <= 50 or time.monotonic() < began + 3:
        assert time.monotonic() < began + 120, f"{killed} killed"
        killed += sum(worker.exitcode == -signal.SIGKILL for worker in workers)
        workers = [worker for worker in workers if worker.exitcode is None]
        while len(workers) < 6:
            workers.append(CONTEXT.Process(target=_come_and_go, args=(tmp_path, started), daemon=True))
            workers[-1].start()
            started += 1
        time.sleep(0.01)
    (tmp_path / "enough").touch()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode in (0, -signal.SIGKILL)
    lines = log.read_text().splitlines()
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    assert all(entered.split() == ["in", left.split()[1]] and left.startswith("out") for entered, left in pairs)


class _Asleep(RunLock):
    """Falls asleep between looking and creating, while others take the lock and let it go."""

    def _create(self, number, own):
        if not self.__dict__.setdefault("woken", False):
            self.woken = True
            for _ in range(3):
                with RunLock(self._run, what="others"):
                    pass
            self.kept = RunLock(self._run, what="others").__enter__()
        return super()._create(number, own)


def test_a_process_that_was_asleep_gives_way(tmp_path):
    """Its number is unused by then: those who used it are through, and their files removed."""
    leave(tmp_path)
    late = _Asleep(tmp_path, what="training")
    with pytest.raises(InputError, match="in use by others"):
        late.__enter__()
    late.kept.check()
    late.kept.release()
    with late:
        late.check()


def test_a_full_disk_is_a_message_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys; from grasp_dist.run_lock import RunLock\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); RunLock(sys.argv[1], what='training').__enter__()"
    )
    found = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert f"InputError: cannot lock the run directory {tmp_path}: File too large" in found.stderr
    assert not list((tmp_path / ".lock").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.parametrize(
    ("options", "message"),
    [("size=4k", "the disk is full; free some space"), ("ro", "the file system is read-only; choose another run_dir")],
)
def test_what_the_file_system_refuses_is_a_message(tmp_path, options, message):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        if options != "ro":
            (tmp_path / "rest").write_bytes(b"0" * 4096)
        with pytest.raises(InputError, match=f"cannot lock the run directory {tmp_path}: {message}"):
            RunLock(tmp_path, what="training").__enter__()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_directory_of_another_owner_is_a_message(tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(InputError, match="permission is denied"):
        RunLock(tmp_path, what="training").__enter__()


def test_processes_are_told_apart_with_and_without_proc():
    process = subprocess.Popen([sys.executable, "-c", FOREVER.join(["import time; ", ""])])
    for look in (_process, _asked_of_ps):
        alive, started = look(process.pid)
        assert alive
        assert started
        assert look(os.getpid())[1] != started or look is _asked_of_ps  # which counts in seconds
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not _process(process.pid)[0]
    assert not _asked_of_ps(process.pid)[0]
    process.wait()
    assert _process(process.pid) == _asked_of_ps(process.pid) == (False, None)


def test_it_needs_no_torch(tmp_path):
    code = (
        "import sys; from grasp_dist.run_lock import RunLock\n"
        "with RunLock(sys.argv[1], what='training') as lock: lock.check()\n"
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


# -- parts of a run


def test_parts_are_held_beside_each_other_but_each_only_once(tmp_path):
    with RunLock(tmp_path, what="one", part="project/a/seed-0"), RunLock(tmp_path, what="two", part="project/b/seed-0"):
        with pytest.raises(InputError, match=r"project/a/seed-0 in .* is in use by one"):
            RunLock(tmp_path, what="three", part="project/a/seed-0").__enter__()
        holder, seconds = holder_of(tmp_path, "project/b/seed-0")
        assert (holder.what, holder.pid) == ("two", os.getpid())
        assert 0 <= seconds < 60
    assert holder_of(tmp_path, "project/b/seed-0") is None


def test_the_whole_excludes_its_parts_and_they_it(tmp_path):
    with RunLock(tmp_path, what="all"):
        with pytest.raises(InputError, match=r"the run directory .* is in use by all"):
            RunLock(tmp_path, what="one", part="project/a/seed-0").__enter__()
        assert holder_of(tmp_path)[0].what == "all"
    with RunLock(tmp_path, what="one", part="project/a/seed-0") as part:
        with pytest.raises(InputError, match="is in use by one"):
            RunLock(tmp_path, what="all").__enter__()
        part.check()
        assert holder_of(tmp_path) is None  # whoever was refused has let go
    with RunLock(tmp_path, what="all"):
        pass


def test_a_part_whose_holder_was_killed_is_free(tmp_path):
    code = (
        "import os, sys; from grasp_dist.run_lock import RunLock\n"
        "RunLock(sys.argv[1], what='one', part='naive/seed-0').__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert holder_of(tmp_path, "naive/seed-0") is None
    with RunLock(tmp_path, what="all"):
        pass


def test_nobody_works_on_the_run_or_a_part_of_it(tmp_path):
    """Looked at without taking anything; and what this process holds itself does not count."""
    await_free(tmp_path, what="launch")
    assert not list(tmp_path.iterdir())
    with RunLock(tmp_path, what="launch", part="launch"):
        await_free(tmp_path, what="launch")
    holder = hold(tmp_path)
    with pytest.raises(
        InputError, match=rf"the run directory .* is in use by training of .*`kill {holder.pid}`.* remove "
    ):
        await_free(tmp_path, what="launch")
    end(holder)
    await_free(tmp_path, what="launch")
    with RunLock(tmp_path, what="training", part="naive/seed-0"):
        look = "import sys; from grasp_dist.run_lock import await_free; await_free(sys.argv[1], what='launch')"
        seen = subprocess.run([sys.executable, "-c", look, str(tmp_path)], capture_output=True, text=True, check=False)
    assert f"naive/seed-0 in {tmp_path} is in use by training of" in seen.stderr


def test_many_parts_left_behind_are_waited_for_together(tmp_path):
    for number in range(8):
        leave_elsewhere(tmp_path, f"project/arm-{number}/seed-0")
    for work in (
        lambda: await_free(tmp_path, what="launch", patience=2),
        lambda: RunLock(tmp_path, what="training", patience=2).__enter__().release(),
    ):
        started = time.monotonic()
        work()
        assert 2 <= time.monotonic() - started < 8
    await_free(tmp_path, what="launch", patience=60, ended=lambda holder: holder.host == "elsewhere")


def test_a_part_that_gives_a_sign_of_life_elsewhere_is_refused(tmp_path):
    leave_elsewhere(tmp_path, "naive/seed-0", silent=1000)
    alive = leave_elsewhere(tmp_path, "naive/seed-1", silent=1000)
    beat = threading.Timer(0.5, os.utime, [alive])
    beat.start()
    started = time.monotonic()
    with pytest.raises(InputError, match=r"naive/seed-1 in .* is in use by training of .* on elsewhere"):
        await_free(tmp_path, what="launch", patience=60)
    assert time.monotonic() - started < 10
    beat.join()
