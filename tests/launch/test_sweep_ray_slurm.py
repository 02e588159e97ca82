"""The sweep in a Ray that a Slurm job starts on its node."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.launch.ray_cases import finished, in_training
from tests.slurm_cluster import TERMINAL
from tests.tiny_runs import grasp_dist, tiny_config

pytest.importorskip("ray.tune", reason="needs ray[train,tune]")


@pytest.mark.slow
def test_ray_in_a_slurm_job_is_preempted_and_goes_on(organism, tmp_path, ray_alone, slurm):
    """One job starts Ray on its node, with a token of its own; asked to stop, it is requeued and repeats nothing."""
    if missing := [name for name in ("ip", "getent", "hostname") if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    tree = tiny_config(organism, tmp_path / "run")
    tree["training"] |= {"steps": 160}
    tree["checkpoint"] = {"every": 20}
    tree["evaluate"] |= {"shift": False, "ablation": False}
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tree))
    cluster = {"train": {"nodes": 1, "tasks_per_node": 2, "time": "00:30:00"}, "lead_seconds": 60}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**cluster, "environment": {"OMP_NUM_THREADS": "1"}}))
    command = [
        "sweep",
        config,
        "--tune.rank",
        "1,2",
        "--tune.side",
        "write",
        "--ray",
        "--cluster",
        tmp_path / "mine.yaml",
    ]
    shown = grasp_dist(*command, "--dry-run")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    done = grasp_dist(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "launch" / "1" / "sweep.sbatch").read_text() in shown.stdout, "what was shown is what was submitted"
    job = json.loads((run / "launch" / "1" / "record.json").read_text())["jobs"][0]["job_id"]
    logs = run / "launch" / "1" / "logs"

    def said() -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(logs.iterdir()))

    slurm.until(lambda: in_training(run), 240, said)
    before = finished(run, "**/*")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.until(lambda: slurm.job(job).get("Restarts") == "1", 120, said)
    slurm.until(lambda: slurm.state(job) in TERMINAL, 400, said)
    assert slurm.state(job) == "COMPLETED", said()
    assert "the sweep stopped: it was asked to" in said()
    assert {task: found for task, found in finished(run, "**/*").items() if task in before} == before
    results = json.loads((run / "sweep" / "sweep.json").read_text())
    assert [row["name"] for row in results["combinations"]] == ["write-k1", "write-k2", "random-write-k2"]
    assert json.loads((run / "project/write-k1/seed-0/manifest.json").read_text())["world_size"] == 2
    assert not list((run / "launch" / "1").glob("token-*"))
    assert not Path(f"/tmp/ray-{job}").exists()
