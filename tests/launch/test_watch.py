"""Jobs of a real Slurm as `status`, `logs` and `cancel` see them: alive, failed, and what waits behind a failed one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from shutil import which

import pytest

from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph
from grasp_dist.launch import slurm as commands
from grasp_dist.launch import watch
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.preconditions import check_nothing_runs
from grasp_dist.launch.records import Record, Submitted, make_folder
from grasp_dist.launch.status import RunReader, TaskStatus

pytestmark = pytest.mark.slow

JOBS = [
    Job("naive", "naive", ("naive/seed-0",), "train"),
    Job("project", "project", ("project/grasp/seed-0", "project/random/seed-0"), "train"),
    Job("report", "report", ("report",), "light", after=("project",)),
]
SCRIPT = """#!/bin/bash
#SBATCH --job-name=run-{key}
#SBATCH --output=logs/%x-%j.out
#SBATCH --kill-on-invalid-dep=yes
exec >>"logs/{key}-{job}-r0.log" 2>&1
echo "start of $SLURM_JOB_ID"
{body}
"""


@pytest.fixture
def run(write_config) -> Path:
    graph = RunGraph(load_config(write_config()))
    graph.claim()
    return graph.root


def _submit(run: Path, bodies: dict[str, str]) -> Record:
    """A launch of jobs that do what `bodies` says."""
    folder = make_folder(run)
    ids: dict[str, str] = {}
    for job in JOBS:
        name = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if job.is_array else "$SLURM_JOB_ID"
        (folder / f"{job.key}.sbatch").write_text(SCRIPT.format(key=job.key, job=name, body=bodies[job.key]))
        options = ["--array=0-1"] if job.is_array else []
        if job.after:
            options.append("--dependency=afterok:" + ":".join(ids[key] for key in job.after))
        ids[job.key] = commands.sbatch(f"{job.key}.sbatch", folder=folder, options=options)
    submitted = (replace(Submitted.of(job, name=f"run-{job.key}"), job_id=ids[job.key]) for job in JOBS)
    record = Record(folder, "test", "sbatch", tuple(submitted))
    record.write()
    return record


def _statuses(run: Path) -> dict[str, TaskStatus]:
    return {status.name: status for status in RunReader(run).read(watch.jobs_of(run))}


def test_running_failed_and_dependent_jobs(slurm, run):
    second = 'if [ "$SLURM_ARRAY_TASK_ID" = 1 ]; then echo "a reason"; exit 3; fi; sleep 300'
    record = _submit(run, {"naive": "sleep 300", "project": second, "report": "true"})
    ids = {job.key: job.job_id for job in record.jobs}
    slurm.until(lambda: _statuses(run)["project/random/seed-0"].state == "failed", 60)
    slurm.until(lambda: _statuses(run)["project/grasp/seed-0"].state == "running", 60)
    found = _statuses(run)
    assert (found["naive/seed-0"].state, found["naive/seed-0"].job) == ("running", ids["naive"])
    failed = found["project/random/seed-0"]
    assert failed.job == f"{ids['project']}_1"
    assert "exit code 3:0" in failed.why
    assert found["detect"].state == "not started"

    log = watch.newest_log(run, "project/random/seed-0")
    assert watch.last_lines(log, 5)[-1] == "a reason"
    assert watch.newest_log(run, "detect") is None
    (log.parent / log.name.replace("-r0", "-r10")).write_text("later\n")
    (log.parent / log.name.replace("-r0", "-r9")).write_text("earlier\n")
    assert watch.last_lines(watch.newest_log(run, "project/random/seed-0"), 5) == ["later"]

    said = list(watch.cancel(run, list(found.values())))
    assert sorted(line.split(": ")[0] for line in said if "cancelled" in line)[:2] == [
        "naive/seed-0",
        "project/grasp/seed-0",
    ]
    slurm.wait_empty(60)
    found = _statuses(run)
    assert {found[name].state for name in ("naive/seed-0", "project/grasp/seed-0", "report")} == {"stopped"}
    assert found["project/random/seed-0"].state == "failed"


def test_what_waits_behind_a_failed_job_does_not_wait_for_ever(slurm, run):
    _submit(run, {"naive": "true", "project": "exit 4", "report": "true"})
    slurm.wait_empty(60)
    found = _statuses(run)
    assert found["report"].state == "stopped"
    assert "Dependency" in found["report"].why
    assert found["project/grasp/seed-0"].state == "failed"


def test_what_only_accounting_remembers(slurm, run, monkeypatch):
    """Of jobs that `scontrol` has forgotten: where they ran, how they ended, and elements that had not started."""
    if not slurm.accounting:
        pytest.skip("needs slurmdbd and mariadb-server-core")
    record = _submit(run, {"naive": "exit 4", "project": "true", "report": "true"})
    ids = {job.key: job.job_id for job in record.jobs}
    (record.folder / "wait.sbatch").write_text(SCRIPT.format(key="project", job="$SLURM_JOB_ID", body="true"))
    slurm.wait_empty(60)
    options = ["--array=0-79:3,80", "--begin=now+1hour"]
    ids["project"] = commands.sbatch("wait.sbatch", folder=record.folder, options=options)
    tasks = tuple(f"project/arm-{number}/seed-0" for number in range(81))
    project = replace(record.jobs[1], tasks=tasks, job_id=ids["project"])
    replace(record, jobs=(record.jobs[0], project, record.jobs[2])).write()
    assert set(watch.jobs_of(run)) == {"naive/seed-0", "report", *tasks[0:79:3], tasks[80]}
    slurm.run("scancel", ids["project"])
    monkeypatch.setattr(commands, "show_jobs", lambda job_id: {})
    slurm.until(lambda: (job := watch.jobs_of(run).get(tasks[80])) and job.state == "CANCELLED", 30)
    found = watch.jobs_of(run)
    assert (found["naive/seed-0"].state, found["naive/seed-0"].job) == ("FAILED", ids["naive"])
    assert found["naive/seed-0"].reason.startswith("exit code 4:0, on node")
    assert found["report"].state == "COMPLETED"
    assert {found[task].state for task in tasks if task in found} == {"CANCELLED"}
    assert found[tasks[78]].reason in ("", "BeginTime")  # as the controller told it
    assert len(found) == 2 + 28


def test_a_job_that_is_submitted_again_by_hand(slurm, run):
    """From the folder of its launch, as its script says: watched, and stopped, in the place of the recorded one."""
    record = _submit(run, {"naive": "exit 4", "project": "true", "report": "true"})
    slurm.wait_empty(60)
    assert _statuses(run)["naive/seed-0"].state == "failed"
    script = record.folder / "naive.sbatch"
    script.write_text(script.read_text().replace("exit 4", "sleep 300"))
    again = commands.sbatch("naive.sbatch", folder=record.folder)
    slurm.until(lambda: _statuses(run)["naive/seed-0"].state == "running", 60)
    found = _statuses(run)["naive/seed-0"]
    assert found.job == again
    with pytest.raises(InputError, match=rf"jobs of an earlier launch of .* are still there: {again} \(run-naive"):
        check_nothing_runs(run)
    slurm.until(lambda: watch.newest_log(run, "naive/seed-0").name == f"naive-{again}-r0.log", 20)
    assert list(watch.cancel(run, [found])) == [f"naive/seed-0: job {again} cancelled"]
    slurm.wait_empty(60)
    assert (_statuses(run)["naive/seed-0"].state, _statuses(run)["naive/seed-0"].job) == ("stopped", again)


def test_hidden_partitions_are_the_clusters_too(slurm, tmp_path, monkeypatch):
    """Asked by a user; root sees them anyway."""
    (tmp_path / "sinfo").write_text(f'#!/bin/bash\nexec setpriv --reuid=65534 --clear-groups {which("sinfo")} "$@"\n')
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm.run("scontrol", "update", "partitionname=urgent", "hidden=yes")
    try:
        assert commands.partitions() == ["main", "urgent"]
    finally:
        slurm.run("scontrol", "update", "partitionname=urgent", "hidden=no")
