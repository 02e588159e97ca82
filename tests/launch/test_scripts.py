"""Rendered job scripts: as the golden files have them, sound shell for every cluster, and nothing of a value is run.

`python tests/launch/test_scripts.py` writes the golden files anew; read the difference before you commit it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from grasp_dist.errors import InputError
from grasp_dist.launch.cluster import Cluster, cluster_names, load_cluster
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.scripts import Place, dependency, job_name, render
from grasp_dist.launch.slurm import slurm_environment
from grasp_dist.launch.sweep.ray_job import render_ray_job, whole_job
from tests.launch.shell_checks import SOURCED, check_shell

GOLDEN = Path(__file__).parent / "golden"
PLACE = Place(Path("/shared/me/runs/mine/launch/1"), Path("/shared/me"), Path("/shared/me/runs/mine"))
NAIVE = Job("naive", "naive", ("naive/seed-0",), "train")
PROJECT = Job("project", "project", ("project/grasp/seed-0", "project/random/seed-0"), "train", ("detect",))
EVALUATE = Job("evaluate", "evaluate", ("evaluate/grasp/seed-0", "evaluate/random/seed-0"), "evaluate", (), "project")
REPORT = Job("report", "report", ("report",), "light", ("evaluate",))
JOBS = (NAIVE, PROJECT, EVALUATE, REPORT)

CONTAINERS = {
    "pyxis": {"runtime": "pyxis", "image": "nvcr.io#nvidia/pytorch:26.01-py3", "mounts": ["/shared:/shared:ro"]},
    "apptainer": {"runtime": "apptainer", "image": "/shared/my images/torch.sif", "options": ["--no-home"]},
}
EVERYTHING = {
    "partition": "h100,h200",
    "account": "team",
    "qos": "long",
    "constraint": "h100&ib",
    "reservation": "mine",
    "gpus_per_node": 8,
    "gpu_type": "h100",
    "gpu_option": "gpus-per-node",
    "train": {"nodes": 2, "cpus_per_task": 12, "memory": "0", "exclusive": True, "time": "1-00:00:00"},
    "interface": "ib0",
    "environment": {"NCCL_IB_HCA": "=mlx5_0,mlx5_3", "GREETING": 'it\'s $(not run) `either` "$HOME"'},
    "modules": ["cuda/12.8", "nccl"],
    "setup": ["ulimit -n 65536"],
    "python": "/shared/my venv/bin/python",
    "scratch": "/scratch/$USER/${SLURM_JOB_ID}",
    "max_array_width": 4,
    "srun_options": ["--mpi=none"],
    "requeue": False,
}


def _cases() -> dict[str, tuple[Job, Cluster]]:
    python = {"python": "/shared/venv/bin/python"}
    bare = Cluster(train={"nodes": 2, "tasks_per_node": 1}, **python)
    cases = {
        "cpu-naive": (NAIVE, bare),
        "cpu-report": (REPORT, bare),
        "everything-project": (PROJECT, Cluster(**EVERYTHING)),
        "h100-evaluate": (EVALUATE, load_cluster("slurm-h100-ib", python)[1]),
    }
    for name, container in CONTAINERS.items():
        cases[f"{name}-project"] = (PROJECT, Cluster(gpus_per_node=4, container=container))
    return cases


@pytest.mark.parametrize("name", sorted(_cases()))
def test_a_script_is_as_the_golden_file(name):
    job, cluster = _cases()[name]
    assert render(job, cluster, PLACE) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", cluster_names())
@pytest.mark.parametrize("container", ["none", *CONTAINERS])
def test_every_cluster_that_comes_along_gives_sound_shell(name, container, tmp_path):
    _, cluster = load_cluster(name, {"container": CONTAINERS.get(container, {})})
    for job in JOBS:
        check_shell(render(job, cluster, PLACE), tmp_path, exclude=SOURCED)


@pytest.mark.parametrize("name", sorted(_cases()))
def test_the_golden_files_are_sound_shell(name, tmp_path):
    job, cluster = _cases()[name]
    check_shell(render(job, cluster, PLACE), tmp_path, exclude=SOURCED)


# Without % and backslash, which the folder of a launch cannot hold.
NASTY = "a b'c\"d$(touch CANARY)`touch CANARY`;touch CANARY&|>x*?~!#{}[]\u00e9"


@pytest.mark.parametrize("requeue", [True, False])
def test_no_value_is_run_or_changed_by_the_shell(tmp_path, requeue):
    """The script runs with stand-ins for Slurm's commands, of which srun notes what it was given."""
    run = tmp_path / NASTY / "run"
    place = Place(run / "launch" / "1", tmp_path / NASTY, run, slurm_conf=f"/{NASTY}")
    (place.folder / "logs").mkdir(parents=True)
    programs = tmp_path / "bin"
    programs.mkdir()
    note = 'printf "%s\\0" "$@" > "$NOTES"; printf "%s\\0" "$PWD" "$VALUE" "$TMPDIR" "$SLURM_CONF" >> "$NOTES"\n'
    note += 'printf "%s\\0" "$SLURM_EXPORT_ENV" "${SLURM_CLUSTERS-}" >> "$NOTES"\n'
    for name, text in {"srun": note, "scontrol": "echo node1\n", "squeue": "echo RUNNING\n"}.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    python = f"/{NASTY}/python"
    option, value = f"--x={NASTY}%\\x", f"{NASTY}%\\x"
    scratch = "/s c/$USER/" + NASTY.translate({ord(character): None for character in "$`\"'\\{}()"})
    cluster = Cluster(
        environment={"VALUE": value}, python=python, srun_options=[option], scratch=scratch, requeue=requeue
    )
    job = Job("project", "project", ("project/grasp/seed-0", NASTY), "train")
    text = render(job, cluster, place)
    check_shell(text, tmp_path, exclude=SOURCED)
    script = tmp_path / "script"
    script.write_text(text)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NODELIST": "node1"}
    environ = {"PATH": f"{programs}:/usr/bin:/bin", "NOTES": str(tmp_path / "notes"), "USER": "me", **slurm}
    environ |= {"SLURM_EXPORT_ENV": "NONE", "SLURM_CLUSTERS": "other"}  # of `sbatch --export=NONE --clusters=other`
    done = subprocess.run(["bash", str(script)], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    log = place.folder / "logs" / "project-6_1-r0.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    given = (tmp_path / "notes").read_text().split("\0")[:-1]
    config = str(place.folder / "config.yaml")
    program = [python, "-m", "grasp_dist.launch.task", config, "project", "--only", NASTY]
    assert given[:-6] == ["--kill-on-bad-exit=0", "--wait=60", option, *program]
    assert given[-6:-2] == [str(place.workdir), value, scratch.replace("$USER", "me"), f"/{NASTY}"]
    assert given[-2:] == ["ALL", ""]
    assert not list(tmp_path.rglob("CANARY"))


class Stage:
    """Runs a script with stand-ins for the commands around it; `calls` has what the script asked of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, Place(folder / "launch" / "1", folder, folder)
        self.programs = folder / "bin"
        for path in (self.place.folder / "logs", self.programs):
            path.mkdir(parents=True)

    def run(self, launcher: str, cluster: Cluster, **commands: str) -> tuple[int, str, list[str]]:
        """Exit code, log, calls. commands: the stand-ins' shell lines."""
        usual = {"srun": "exit 0", "squeue": "echo RUNNING", "requeue": "exit 0", "hostname": "echo 127.0.0.1"}
        commands = usual | commands
        commands["scontrol"] = (
            f'[ "$1" = requeue ] || {{ printf "node1\\nnode2\\n"; exit 0; }}\n{commands.pop("requeue")}'
        )
        for name, lines in commands.items():
            text = f'#!/bin/bash\necho "{name} $*" >>{self.folder}/calls\n{lines}\n'
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)
        script = self.folder / "script"
        script.write_text(self.script(launcher, cluster))
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}
        done = subprocess.run(
            ["bash", str(script)], env={"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": "/", **slurm},
            cwd=self.folder, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        log = next((self.place.folder / "logs").iterdir()).read_text()
        return done.returncode, log + done.stderr, (self.folder / "calls").read_text().splitlines()

    def script(self, launcher: str, cluster: Cluster) -> str:
        if launcher == "ray":
            return render_ray_job(whole_job(cluster, trials=2), self.place)
        if launcher == "submitit":
            pytest.importorskip("submitit")
            from grasp_dist.launch.submitit_jobs import SlurmJobs

            return SlurmJobs(cluster, self.place).script(NAIVE, {})
        return render(NAIVE, cluster, self.place)


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


@pytest.mark.parametrize("launcher", ["sbatch", "submitit", "ray"])
def test_asked_while_it_still_prepares_nothing_is_started_and_it_comes_back(stage, launcher):
    code, log, calls = stage.run(launcher, Cluster(python="/python", setup=["kill -TERM $$"]))
    assert (code, calls[-1]) == (0, "scontrol requeue 7"), log
    assert not [call for call in calls if call.startswith("srun") and "stop --force" not in call]


@pytest.mark.parametrize(("code", "comes_back"), [(75, True), (134, True), (137, True), (1, False), (2, False)])
def test_asked_as_srun_starts(stage, code, comes_back):
    """srun loses what comes in its first moments. It gives the highest code of all processes, which may hide 75."""
    srun = f"""
        [[ "$*" != *--immediate* ]] || exit 0
        trap '' USR1
        kill -USR1 "$PPID"
        sleep 0.1
        trap 'exit {code}' USR1
        for _ in {{1..100}}; do sleep 0.05; done"""
    ended, log, calls = stage.run("sbatch", Cluster(python="/python", train={"nodes": 2}), srun=srun)
    assert ended == (0 if comes_back else code), log
    assert ("scontrol requeue 7" in calls) is comes_back
    assert ("it was asked to stop" in log) is comes_back


@pytest.mark.parametrize(
    ("code", "probe", "said"),
    [
        (1, '[[ "$*" = *--mpi=none* ]]', "failed with exit code 1"),
        (1, "false", "srun fails on node1 too"),
        (1, '[[ "$*" != *node2* ]]', "stopped:  node node2 does not answer;"),
        (2, "false", "failed with exit code 2"),
    ],
)
def test_a_failure_is_a_lost_node_only_where_the_others_answer(stage, code, probe, said):
    """A node is asked by an srun that needs what every srun of the cluster needs."""
    cluster = Cluster(python="/python", train={"nodes": 2}, srun_options=["--mpi=none"])
    srun = f'[[ "$*" = *--immediate* ]] || exit {code}\n{probe}'
    ended, log, calls = stage.run("sbatch", cluster, srun=srun)
    assert said in log
    lost = "node2 does not answer" in said
    assert (ended, "scontrol requeue 7" in calls) == (0 if lost else code, lost), log
    if code == 2:
        assert len([call for call in calls if call.startswith("srun")]) == 1


SILENT = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"


@pytest.mark.parametrize("launcher", ["sbatch", "ray"])
@pytest.mark.parametrize(
    ("lead", "commands", "code", "said"),
    [
        (30, {"squeue": f"[ $(grep -c squeue calls) -gt 2 ] || {{ {SILENT}; }}\necho RUNNING"}, 0, "requeued"),
        (30, {"requeue": f"[ $(grep -c requeue calls) -gt 2 ] || {{ {SILENT}; }}"}, 0, "requeued"),
        (1, {"squeue": SILENT}, 0, "requeued"),
        (30, {"squeue": "echo CANCELLED"}, 75, "not requeued: Slurm says that the job is CANCELLED"),
        (30, {"requeue": SILENT}, 75, "scontrol requeue: Unable to contact slurm controller (connect failure)"),
    ],
)
def test_a_controller_that_does_not_answer_is_asked_again(stage, launcher, lead, commands, code, said):
    cluster = Cluster(python="/python", setup=["kill -TERM $$"], lead_seconds=lead)
    ended, log, calls = stage.run(launcher, cluster, sleep="exec /bin/sleep 0.1", **commands)
    assert (ended, said in log) == (code, True), log
    assert "Slurm says that the job is \n" not in log
    asked = sum(call == "scontrol requeue 7" for call in calls)
    assert asked == {"": 1, SILENT: 4}.get(commands.get("requeue", ""), 3) * ("CANCELLED" not in said)


def test_sbatch_hears_of_the_environment_what_no_script_says():
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "big", "SBATCH_WCKEY": "mine", "HOME": "/me"}
    of_a_job = {"SLURM_NTASKS": "7", "SLURM_EXPORT_ENV": "NONE"}
    of_the_user = {
        "SBATCH_TIMELIMIT": "5",
        "SBATCH_PARTITION": "gpu",
        "SBATCH_SIGNAL": "TERM@9",
        "SBATCH_EXPORT": "NONE",
    }
    assert slurm_environment({**kept, **of_a_job, **of_the_user}) == kept


@pytest.mark.parametrize("path", ["/runs/a\nb", "/runs/a\x1b[2Jb"])
def test_a_line_break_in_a_path_is_refused(path):
    with pytest.raises(InputError, match="control character"):
        Place(Path(path) / "launch" / "1", Path("/shared/me"), Path(path))


@pytest.mark.parametrize("path", ["/runs/100%j", "/runs/a\\b"])
def test_what_slurm_replaces_in_file_names_is_refused(path):
    with pytest.raises(InputError, match="holds a % or a backslash"):
        Place(Path(path) / "launch" / "1", Path("/shared/me"), Path(path))


def test_a_container_cannot_mount_what_its_option_would_split():
    cluster = Cluster(container=CONTAINERS["pyxis"])
    place = Place(Path("/runs/a,b/launch/1"), Path("/shared/me"), Path("/runs/a,b"))
    with pytest.raises(InputError, match="comma or a colon"):
        render(NAIVE, cluster, place)


def test_job_names_hold_nothing_that_a_directive_could_break_on():
    assert job_name("naive", Path(f"/runs/{NASTY}")) == "a-b-c-d-touch-CANARY-touch-CANARY-touch-naive"


def test_dependencies_are_given_for_what_was_submitted():
    assert dependency(NAIVE, {}) == []
    assert dependency(EVALUATE, {"project": "7"}) == ["--dependency=aftercorr:7"]
    both = Job("evaluate", "evaluate", ("a", "b"), "evaluate", ("naive", "detect"), "project")
    assert dependency(both, {"naive": "5", "project": "7"}) == ["--dependency=afterok:5,aftercorr:7"]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case, (golden_job, golden_cluster) in _cases().items():
        (GOLDEN / f"{case}.sbatch").write_text(render(golden_job, golden_cluster, PLACE))
