"""The script of the job that starts Ray on a Slurm cluster: as the golden files have it, sound shell, nothing injected.

`python -m tests.launch.test_sweep_ray_job` writes the golden files anew; read the difference before you commit it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from grasp_dist.config import RunConfig
from grasp_dist.launch.cluster import Cluster, cluster_names, load_cluster
from grasp_dist.launch.scripts import Place
from grasp_dist.launch.sweep.ray_job import render_ray_job, submit_ray_sweep, whole_job, within
from tests.launch.shell_checks import check_shell
from tests.tiny_runs import tiny_config

GOLDEN = Path(__file__).parent / "golden"
PLACE = Place(Path("/shared/me/runs/mine/launch/1"), Path("/shared/me"), Path("/shared/me/runs/mine"))
CONTAINERS = {
    "none": {},
    "pyxis": {"runtime": "pyxis", "image": "nvcr.io#nvidia/pytorch:26.01-py3"},
    "apptainer": {"runtime": "apptainer", "image": "/shared/my images/torch.sif"},
}


def _cases() -> dict[str, Cluster]:
    python = {"python": "/shared/my venv/bin/python"}
    pyxis = {"container": CONTAINERS["pyxis"], "interface": "ib0", "requeue": False, "modules": ["cuda/12.8"]}
    return {
        "ray-cpu": Cluster(train={"tasks_per_node": 2}, **python),
        "ray-h100": load_cluster("slurm-h100-ib", python)[1],
        "ray-pyxis": Cluster(gpus_per_node=4, scratch="/scratch/$USER", **pyxis),
    }


def _render(cluster: Cluster, place: Place = PLACE) -> str:
    return render_ray_job(whole_job(cluster, trials=3), place)


@pytest.mark.parametrize("name", sorted(_cases()))
def test_a_script_is_as_the_golden_file(name):
    assert _render(_cases()[name]) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", [name for name in cluster_names() if load_cluster(name)[1].kind == "slurm"])
def test_every_slurm_cluster_that_comes_along_gives_sound_shell(name, container, tmp_path):
    _, cluster = load_cluster(name, {"container": CONTAINERS[container]})
    check_shell(_render(cluster), tmp_path)


@pytest.mark.parametrize("name", sorted(_cases()))
def test_the_golden_files_are_sound_shell(name, tmp_path):
    check_shell(_render(_cases()[name]), tmp_path)


NASTY = "a b'c\"d$(touch CANARY)`touch CANARY`;touch CANARY&|>x*?~!#{}[]\u00e9"


@pytest.mark.parametrize(("code", "page"), [(0, True), (0, False), (3, True)])
def test_no_value_is_run_and_a_ray_that_did_not_start_is_no_success(tmp_path, code, page):
    """The script runs with a stand-in for srun, which notes what it was given and, if it is to, writes the page."""
    run = tmp_path / NASTY / "run"
    place = Place(run / "launch" / "1", tmp_path / NASTY, run)
    (place.folder / "logs").mkdir(parents=True)
    (run / "sweep").mkdir()
    (run / "sweep" / "sweep.html").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    write = 'sleep 0.05; touch "$PAGE"; ' if page else ""
    ray = 'case "$*" in *symmetric-run*) ;; *) exit 0 ;; esac'
    srun = f'{ray}\nprintf "%s\\0" "$@" "$VALUE" >"$NOTES"\n{write}exit {code}'
    for name, text in {"srun": srun, "squeue": "echo RUNNING", "hostname": "echo 127.0.0.1"}.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    python = f"/{NASTY}/python"
    cluster = Cluster(environment={"VALUE": NASTY}, python=python, srun_options=[f"--x={NASTY}"])
    text = _render(cluster, place)
    check_shell(text, tmp_path)
    script = tmp_path / "script.sbatch"
    env = {
        "PATH": f"{programs}:/usr/bin:/bin", "HOME": "/", "LANG": "C.UTF-8",
        "NOTES": str(tmp_path / "notes"), "PAGE": str(run / "sweep" / "sweep.html"),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "2",
    }  # fmt: skip
    done = subprocess.run(["bash", str(script)], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    log = (place.folder / "logs" / "sweep-7-r0.log").read_text()
    assert done.returncode == (code if page else 1), done.stderr + log
    assert ("Ray did not start" in log) is not page
    given = (tmp_path / "notes").read_text().split("\0")[:-1]
    assert given[:2] == ["--ntasks-per-node=1", f"--x={NASTY}"]
    assert given[2:6] == [python, "-m", "ray.scripts.scripts", "symmetric-run"]
    entry = given[given.index("--") + 1 :]
    folder = place.folder
    program = [python, "-m", "grasp_dist.cli", "sweep", f"{folder}/config.yaml", "--cluster", f"{folder}/ray.yaml"]
    assert entry == [*program, NASTY]
    assert not list(tmp_path.rglob("CANARY"))
    assert not list(place.folder.glob("token-*")), "the token is gone with the job"


def test_nodes_for_so_many_trials_at_once():
    def nodes(trials: int, **cluster: object) -> int:
        return whole_job(Cluster(**cluster), trials=trials).train.nodes

    assert nodes(3, gpus_per_node=8) == 3, "a trial takes a node"
    assert nodes(3, gpus_per_node=8, train={"nodes": 2}) == 6
    assert nodes(5, gpus_per_node=8, train={"gpus_per_node": 2}) == 2, "four trials of two GPUs on a node"
    assert nodes(5, cpus_per_node=16, train={"cpus_per_task": 4}) == 2
    assert nodes(2) == 2
    few = {"gpus_per_node": 8, "cpus_per_node": 96, "train": {"gpus_per_node": 1, "cpus_per_task": 24}}
    assert nodes(8, **few) == 2, "CPUs for four of them on a node"


def test_a_node_has_cpus_and_memory_for_all_of_its_trials():
    train = {"gpus_per_node": 2, "cpus_per_task": 8, "memory": "64G"}
    job = whole_job(Cluster(gpus_per_node=8, train=train), trials=4).train
    assert (job.nodes, job.cpus_per_task, job.memory, job.exclusive) == (1, 4 * 2 * 8, "0", True)


def test_the_ray_cluster_within_the_job_is_a_valid_one_for_a_trial():
    cluster = Cluster(gpus_per_node=8, train={"nodes": 2, "cpus_per_task": 12}, interface="ib0")
    inside = Cluster.model_validate(yaml.safe_load(within(cluster)))
    assert (inside.kind, inside.address, inside.train.nodes) == ("ray", "auto", 2)
    assert (inside.tasks_of("train"), inside.gpus_of("train"), inside.interface) == (8, 8, "ib0")
    assert inside.environment["RAY_AUTH_MODE"] == "token"


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(organism, tmp_path, capsys):
    tree = tiny_config(organism, tmp_path / "run")
    tree["tune"] = {"rank": [1, 2], "side": "write", "concurrent": 2}
    cluster = Cluster(python="/shared/venv/bin/python")
    submit_ray_sweep(RunConfig.model_validate(tree), "mine", cluster, dry_run=True)
    said = capsys.readouterr().out
    place = Place(tmp_path / "run" / "launch" / "1", Path.cwd(), tmp_path / "run")
    assert render_ray_job(whole_job(cluster, trials=2), place) in said
    assert within(cluster) in said
    assert "one job of 2 nodes, at most 8 node-hours" in said
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    for name, cluster in _cases().items():
        (GOLDEN / f"{name}.sbatch").write_text(_render(cluster))
