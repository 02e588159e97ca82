"""The whole pipeline as a user runs it: two processes, files in, a report out, nothing done twice, nothing lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from grasp_dist.basis import model_reference
from tests.tiny_runs import grasp_dist, tiny_config

ARMS = {
    "grasp": {},
    "random": {"basis": "random"},
    "one_shot": {"basis": "one_shot"},
    "full": {"training": {"method": "full", "learning_rate": 1e-3}},
}


@pytest.fixture(scope="module")
def finished(organism, tmp_path_factory) -> tuple[Path, Path, str]:
    """A finished run on two processes: its configuration, its folder, and what it printed."""
    root = tmp_path_factory.mktemp("pipeline")
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump({**tiny_config(organism, root / "run"), "project": {"arms": ARMS}}))
    done = grasp_dist("run", config, "--nproc", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    return config, root / "run", done.stdout


def test_the_run_has_every_model_and_its_report(finished):
    _, run, output = finished
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
    assert {row["model"] for row in scores["models"]} == {"base", "naive", "ablation", *ARMS}
    assert all(row["residual"] <= 1e-6 for row in scores["models"] if row["model"] in ARMS)
    by_model = {row["model"]: row for row in scores["models"]}
    assert by_model["naive"]["probes"]["task"]["value"] > by_model["base"]["probes"]["task"]["value"]
    assert by_model["base"]["probes"]["neutral"]["value"] == 0
    assert by_model["naive"]["probes"]["neutral"]["value"] > 0
    assert (run / "report" / "report.html").is_file()
    assert f"report: {run / 'report' / 'report.html'}" in output
    manifest = json.loads((run / "naive" / "seed-0" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert len((run / "naive" / "seed-0" / "metrics.jsonl").read_text().splitlines()) >= 8


def test_a_second_run_keeps_everything(finished):
    config, run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}
    done = grasp_dist("run", config, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert "will run" not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}


def test_one_process_gives_the_same_figures(finished, write_config, tmp_path):
    _, run, _ = finished
    done = grasp_dist("run", write_config(project={"arms": ARMS}))
    assert done.returncode == 0, done.stdout + done.stderr
    sharded, single = (
        {
            (row["model"], row["seed"]): row
            for row in json.loads((folder / "evaluate" / "scores.json").read_text())["models"]
        }
        for folder in (run, tmp_path / "run")
    )
    assert sharded.keys() == single.keys()
    for key, row in sharded.items():
        for probe, metrics in row["probes"].items():
            assert metrics["value"] == pytest.approx(single[key]["probes"][probe]["value"], rel=2e-3, abs=1e-5), (
                key,
                probe,
            )


def test_a_changed_setting_reruns_what_it_touches_and_says_why(finished):
    config, run, _ = finished
    done = grasp_dist("run", config, "--dry-run", "--project.rank", 1)
    assert done.returncode == 0, done.stderr
    assert "naive/seed-0: finished, kept" in done.stdout
    assert "project/grasp/seed-0: will run: its inputs changed: arm.rank was null, now 1" in done.stdout
    assert "follows project/grasp/seed-0" in done.stdout
    assert not list(run.glob("project/grasp/*.old-*"))


def test_the_trained_adapter_is_an_ordinary_one(finished, organism):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, run, _ = finished
    base = AutoModelForCausalLM.from_pretrained(organism / "model")
    model = PeftModel.from_pretrained(base, run / "project" / "grasp" / "seed-0" / "adapter")
    assert max(p.abs().max().item() for name, p in model.named_parameters() if "lora_B" in name) > 0
    manifest = json.loads((run / "project" / "grasp" / "seed-0" / "manifest.json").read_text())
    assert manifest["base_model"]["hash"] == model_reference(organism / "model", None)["hash"]


def test_inspect_and_preview(finished):
    config, run, _ = finished
    shown = grasp_dist("inspect", run / "detect" / "basis.safetensors")
    assert shown.returncode == 0, shown.stderr
    assert "down_proj" in shown.stdout
    shown = grasp_dist("inspect", run / "naive" / "seed-0" / "adapter")
    assert shown.returncode == 0, shown.stderr
    shown = grasp_dist("preview-data", config)
    assert shown.returncode == 0, shown.stderr
    assert "d0" in shown.stdout


def test_detect_from_an_adapter_alone(finished, tmp_path):
    _, run, _ = finished
    adapter = run / "naive" / "seed-0" / "adapter"
    done = grasp_dist(
        "detect", "--adapter", adapter, "--rank", 2, "--side", "both", "--out", tmp_path / "b.safetensors"
    )
    assert done.returncode == 0, done.stderr
    from grasp_dist import SpuriousBasis

    basis = SpuriousBasis.load(tmp_path / "b.safetensors")
    assert basis.sides(basis.weights[0]) == ("write", "read")


def test_the_weights_of_finished_fine_tunes_are_read_by_every_method(organism, finished, tmp_path):
    _, run, _ = finished
    adapters = [run / "naive" / "seed-0" / "adapter", run / "project" / "random" / "seed-0" / "adapter"]
    out = tmp_path / "basis.safetensors"
    base = ["--base-model", organism / "model", "--rank", 2, "--out", out]
    for method, given in (("consensus", adapters[:1]), ("intruder", adapters[:1]), ("agreement", adapters)):
        asked = [part for adapter in given for part in ("--adapter", adapter)]
        done = grasp_dist("detect", *asked, "--method", method, *base)
        assert done.returncode == 0, done.stderr
        assert f"{method}: confidence" in done.stdout
        assert out.is_file() != ("no direction was found" in done.stdout)
        out.unlink(missing_ok=True)
    refused = grasp_dist("detect", "--adapter", adapters[0], "--method", "agrement", *base)
    assert refused.returncode == 2
    assert "no detector 'agrement'" in refused.stderr


def test_reports_of_several_runs_are_pooled(finished, tmp_path):
    _, run, _ = finished
    done = grasp_dist("report", run, run, "--out", tmp_path / "pooled")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pooled" / "report.json").is_file()


@pytest.mark.slow
def test_a_group_started_by_torchrun_checks_first_and_honours_dry_run(organism, tmp_path):
    """Found in review: with WORLD_SIZE set, checks and --dry-run were passed over."""
    tree = tiny_config(organism, tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["grasp_dist.cli", "naive", str(config)]

    def torchrun(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=240, check=False)

    dry = torchrun("--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "nothing was trained" in dry.stdout
    assert not (tmp_path / "run").exists()
    refused = torchrun("--training.modules", "[o_porj]")
    assert refused.returncode != 0
    assert sum(line.startswith("error: ") for line in refused.stderr.splitlines()) == 1
    done = torchrun()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert json.loads((tmp_path / "run" / "naive" / "seed-0" / "manifest.json").read_text())["world_size"] == 2


def test_a_damaged_round_falls_back_to_the_one_before(organism, tmp_path):
    """Rounds behind the newest whole checkpoint are made again; found in review: they were refused for ever."""
    from grasp_dist import SpuriousBasis

    tree = tiny_config(organism, tmp_path / "run")
    tree["training"]["steps"] = 12
    tree["detect"] = {"rounds": 4, "stop_gain": None}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert grasp_dist("detect", config).returncode == 0
    detect = tmp_path / "run" / "detect"
    straight = SpuriousBasis.load(detect / "basis.safetensors").fingerprint()
    states = sorted((detect / "checkpoints").iterdir())
    assert [state.name for state in states] == ["step-00000009", "step-00000012"]
    manifest = json.loads((detect / "manifest.json").read_text())
    (detect / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (detect / "basis.safetensors").unlink()
    (states[1] / "checkpoint.json").write_text("{}")
    done = grasp_dist("detect", config)
    assert done.returncode == 0, done.stderr
    assert f"passed over: {states[1] / 'checkpoint.json'} is damaged" in done.stdout
    assert "continued behind step 9" in done.stdout
    assert SpuriousBasis.load(detect / "basis.safetensors").fingerprint() == straight


@pytest.mark.parametrize(("method", "probes"), [("warm", 1), ("restarted", 1), ("restarted", 2)])
def test_an_interrupted_detection_goes_on_behind_its_last_round(organism, tmp_path, method, probes):
    """Killed in the middle of a round, started again: the same basis as without the interruption."""
    from grasp_dist import SpuriousBasis

    configs = {}
    for name in ("straight", "killed"):
        tree = tiny_config(organism, tmp_path / name)
        tree["training"]["steps"] = 60
        tree["detect"] = {"method": method, "rounds": 6, "steps_per_round": 10, "stop_gain": None}
        tree["detect"] |= {"probe_seeds": probes, "side": "both" if probes == 1 else "write"}
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(tree))
    assert grasp_dist("detect", configs["straight"]).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "grasp_dist.cli", "detect", str(configs["killed"])], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    second = tmp_path / "killed" / "detect" / "rounds" / "round-002" / "committed.json"
    while not second.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "detect" / "basis.safetensors").exists()
    first = (tmp_path / "killed" / "detect" / "rounds" / "round-001" / "committed.json").stat().st_mtime_ns
    done = grasp_dist("detect", configs["killed"])
    assert done.returncode == 0, done.stderr
    assert first == (tmp_path / "killed" / "detect" / "rounds" / "round-001" / "committed.json").stat().st_mtime_ns
    straight, again = (SpuriousBasis.load(tmp_path / name / "detect" / "basis.safetensors") for name in configs)
    assert straight.fingerprint() == again.fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "zero3"])
def test_one_process_and_two_find_the_same_directions(organism, tmp_path, strategy):
    """Sharded sums are rounded in another order; what the rounds find together stays within half a degree."""
    from grasp_dist import SpuriousBasis

    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    found = []
    for processes in (1, 2):
        tree = tiny_config(organism, tmp_path / str(processes))
        tree["training"]["steps"] = 40
        tree["detect"] = {"rounds": 8, "stop_gain": None}
        if processes == 2:
            tree["parallel"] = {"strategy": strategy}
        config = tmp_path / f"{processes}.yaml"
        config.write_text(yaml.safe_dump(tree))
        done = grasp_dist("detect", config, nproc=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(SpuriousBasis.load(tmp_path / str(processes) / "detect" / "basis.safetensors"))
    alone, sharded = found
    assert alone.weights == sharded.weights
    angles = [float(angles.max()) for angles in alone.principal_angles(sharded).values()]
    assert len(angles) == 2 * len(alone.weights)
    assert max(angles) < math.radians(0.5)
