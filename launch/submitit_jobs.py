"""The jobs of a launch through submitit: on Slurm, on this machine (`LocalExecutor`), or in this process (debug).

submitit answers a signal by calling `checkpoint()` on rank 0 at once, inside the handler: a save of one rank's share,
in the middle of a step. Nothing here gives it anything to call. Signals are held back until the work's own
`StopSignals` take them over; all ranks save the same step and the marker commits, and then every process ends with code
75. The job script, which is submitit's with the lines around srun that rendered scripts have, requeues the job on that
code. The pickle of what was submitted stays as it is, so a requeued job finds it; there is a result only when the work
has ended.

    <launch folder>/submitit/    submitit's own folder, new for every launch: ids of another cluster mean other jobs
"""

from __future__ import annotations

import atexit
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_dist.environment import lent
from grasp_dist.errors import PREEMPTED, InputError, Preempted
from grasp_dist.launch.cluster import Cluster, seconds_of
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.local import free_port
from grasp_dist.launch.scripts import CONFIG, Place, command, dependency, directives, job_name, surroundings, template
from grasp_dist.launch.task import ranks_of

__all__ = ["SlurmJobs", "StageTask", "check_submitit", "run_in_order", "short_jobs"]

_FOLDER = "submitit"
_SHORT = 10 * 60
"""Seconds; submitit takes a job for timed out after 0.8 T or T - 10 minutes, whichever comes first."""
# What submitit writes itself.
_ITS_OWN = ("job-name", "output", "open-mode", "array", "signal", "time", "nodes", "ntasks-per-node")


class StageTask:
    """A task of a run, as submitit pickles it: by the name of this class and these three values. It has no
    `checkpoint` method, so submitit's handler has nothing to save with."""

    def __init__(self, config: str, stage: str, task: str) -> None:
        self.config, self.stage, self.task = config, stage, task

    def __call__(self) -> str:
        from grasp_dist.training.preemption import hold_signals

        hold_signals()
        from grasp_dist.config_files import load_config
        from grasp_dist.process import set_up_process
        from grasp_dist.stages import work

        set_up_process()
        os.environ |= _ranks(os.environ)
        try:
            work(load_config(self.config), (self.stage,), only=[self.task])
        except Preempted as stop:
            if not _in_a_job():
                raise
            if os.environ.get("RANK", "0") == "0":
                print(stop, file=sys.stderr, flush=True)
            _end(_asked_code())
        except InputError as error:
            if _in_a_job():
                print(f"error: {error}", file=sys.stderr, flush=True)
                atexit.register(_end, 2)
            raise
        if _in_a_job():
            # As in the worker: gloo's threads abort the interpreter's end now and then, and finished work would look
            # failed. submitit writes the result before.
            atexit.register(_end, 0)
        return self.task


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _in_a_job() -> bool:
    """Whether this process is submitit's, and not that of a person who debugs."""
    return os.environ.get("SUBMITIT_EXECUTOR") in ("slurm", "local")


def _asked_code() -> int:
    if os.environ["SUBMITIT_EXECUTOR"] == "local":
        from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

        return LOCAL_REQUEUE_RETURN_CODE
    return PREEMPTED


def _ranks(environ: Mapping[str, str]) -> dict[str, str]:
    if environ.get("SUBMITIT_EXECUTOR") != "local":
        return ranks_of(environ)
    if environ["SUBMITIT_LOCAL_NTASKS"] == "1":
        return {"LOCAL_RANK": "0"}
    return {
        "RANK": environ["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": environ["SUBMITIT_LOCAL_NTASKS"],
        "LOCAL_RANK": environ["SUBMITIT_LOCAL_LOCALID"],
    }


def check_submitit() -> None:
    """Raise `InputError` if submitit is not installed."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise InputError(
            "the launcher submitit needs submitit: pip install 'grasp-dist[slurm]'; --launcher sbatch does without it"
        ) from None


def short_jobs(jobs: Sequence[Job], cluster: Cluster) -> list[str]:
    """Keys of the jobs that submitit counts as timed out from their first second on."""
    return [job.key for job in jobs if seconds_of(cluster.resources(job.kind).time) <= _SHORT]


class SlurmJobs:
    """Jobs on Slurm by submitit, in a launch folder."""

    def __init__(self, cluster: Cluster, place: Place) -> None:
        self._cluster, self._place = cluster, place

    def script(self, job: Job, ids: Mapping[str, str]) -> str:
        """What submitit hands to sbatch. ids: as of `dependency`."""
        from submitit.slurm.slurm import _make_sbatch_string

        words = shlex.join(["-u", "-m", "submitit.core._submit", str(self._folder)])
        values = self._parameters(job, ids) | ({"map_count": len(job.tasks)} if job.is_array else {})
        return _make_sbatch_string(f"{self._program(job)[1]} {words}", self._folder, **values)

    def submit(self, job: Job, ids: Mapping[str, str]) -> tuple[str, str]:
        """Submit a job; returns its id, and its script within the launch folder. Raises `InputError` with what sbatch
        said."""
        import submitit

        config = str(self._place.folder / CONFIG)
        try:
            executor = submitit.SlurmExecutor(folder=self._folder, python=self._program(job)[1])
            executor.update_parameters(**self._parameters(job, ids))
            with executor.batch():
                handles = [executor.submit(StageTask(config, job.stage, task)) for task in job.tasks]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            said = " ".join(str(error).split())
            raise InputError(f"submitit could not submit {job.key}: {said}") from None
        job_id = handles[0].job_id.partition("_")[0]
        return job_id, f"{_FOLDER}/{job_id}_submission.sh"

    @property
    def _folder(self) -> Path:
        return self._place.folder / _FOLDER

    def _program(self, job: Job) -> tuple[list[str], str]:
        """Options of srun, and Python (in its container) as a shell command."""
        words = shlex.split(" ".join(command(job, self._cluster, self._place, program="")))
        first = next(number for number, word in enumerate(words) if not word.startswith("-"))
        return words[:first], shlex.join(words[first:])

    def _parameters(self, job: Job, ids: Mapping[str, str]) -> dict[str, Any]:
        cluster, place = self._cluster, self._place
        wanted = cluster.resources(job.kind)
        pairs = (line.partition("=") for line in directives(job, cluster, place))
        more = {name: value or True for name, _, value in pairs if name not in _ITS_OWN}
        values = {**surroundings(job, cluster, place), "key": job.key, "tasks": job.tasks}
        # A signal for the shell is for the processes, which have it too: the shell waits for them, or starts none.
        profile = [". /etc/profile"] if cluster.modules else []
        head = ["asked=0", "trap asked=1 USR1 USR2 TERM", *profile, *template("head.sh.j2").render(values).splitlines()]
        tail = ["code=$?", "else", "code=75", "fi", "set -e", *template("tail.sh.j2").render(values).splitlines()]
        waits = dependency(job, ids)
        return {
            "job_name": job_name(job.key, place.run_dir),
            "time": -(-seconds_of(wanted.time) // 60),
            "nodes": wanted.nodes,
            "ntasks_per_node": cluster.tasks_of(job.kind),
            "signal_delay_s": cluster.lead_seconds,
            "array_parallelism": cluster.max_array_width or len(job.tasks),
            # Through srun into the log that the head opens, one for each start, as of rendered scripts.
            "stderr_to_stdout": True,
            "srun_args": ["--output=all", "--kill-on-bad-exit=0", "--wait=60", *self._program(job)[0]],
            "setup": [*head, "set +e", "if ((!asked)); then"],
            "teardown": tail,
            "additional_parameters": more,
            **({"dependency": waits[0].removeprefix("--dependency=")} if waits else {}),
        }


def run_in_order(jobs: Sequence[Job], cluster: Cluster, place: Place, *, debug: bool) -> None:
    """Every task after those before it: as processes of this machine, or with `debug` in this one.

    Raises `InputError` for a task that fails, with the end of its log; with `debug` whatever it raised.
    """
    import submitit

    config = str(place.folder / CONFIG)
    for job in jobs:
        for task in job.tasks:
            print(f"{task}: {'in this process' if debug else 'as processes here'}", flush=True)
            stage = StageTask(config, job.stage, task)
            if debug:
                # Not its result(): that starts a debugger on an error, wherever this runs.
                error = submitit.DebugExecutor(place.folder / _FOLDER).submit(stage).exception()
                if error is not None:
                    raise error
                continue
            executor = submitit.LocalExecutor(place.folder / _FOLDER)
            executor.update_parameters(
                timeout_min=seconds_of(cluster.resources(job.kind).time) / 60,
                tasks_per_node=cluster.tasks_of(job.kind),
                gpus_per_node=cluster.gpus_of(job.kind),
                signal_delay_s=cluster.lead_seconds,
                stderr_to_stdout=True,
            )
            with lent(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())):
                handle = executor.submit(stage)
                handle.wait()
            if handle.exception() is not None:
                log = handle.paths.stdout
                end = "\n".join(log.read_text(errors="replace").splitlines()[-12:]) if log.exists() else ""
                raise InputError(f"{task} failed; the end of its log, {log}:\n{end}")
