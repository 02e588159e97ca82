"""The whole pipeline with DeepSpeed's ZeRO as its engine: the figures of fully_shard."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.tiny_runs import grasp_dist, tiny_config

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

ARMS = {"random": {"basis": "random"}, "full": {"training": {"method": "full", "learning_rate": 1e-3}}}


def _scores(run) -> dict:
    rows = json.loads((run / "evaluate" / "scores.json").read_text())["models"]
    return {(row["model"], row["seed"]): row for row in rows}


@pytest.mark.slow
def test_the_pipeline_with_zero_gives_the_figures_of_fully_shard(organism, tmp_path):
    found = {}
    for strategy in ("fsdp2", "zero3"):
        tree = tiny_config(organism, tmp_path / strategy)
        tree["checkpoint"] = {"every": 3}
        config = tmp_path / f"{strategy}.yaml"
        config.write_text(yaml.safe_dump({**tree, "project": {"arms": ARMS}, "parallel": {"strategy": strategy}}))
        done = grasp_dist("run", config, nproc=2)
        assert done.returncode == 0, done.stdout + done.stderr
        found[strategy] = _scores(tmp_path / strategy)
    assert found["zero3"].keys() == found["fsdp2"].keys()
    for key, row in found["zero3"].items():
        assert (row.get("residual") or 0) <= 1e-6, key
        for probe, metrics in row["probes"].items():
            wanted = found["fsdp2"][key]["probes"][probe]["value"]
            assert metrics["value"] == pytest.approx(wanted, rel=2e-3, abs=1e-5), (key, probe)


def _losses(run) -> list[float]:
    lines = (run / "naive" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_process_that_is_alone_trains_as_without_deepspeed(organism, tmp_path, strategy):
    """DeepSpeed asks for LOCAL_RANK, which nobody has set: ZeRO-3 used to end with a KeyError."""
    losses = []
    for engine in ("none", strategy):
        tree = {**tiny_config(organism, tmp_path / engine), "parallel": {"strategy": engine}}
        config = tmp_path / f"{engine}.yaml"
        config.write_text(yaml.safe_dump(tree))
        done = grasp_dist("naive", config)
        assert done.returncode == 0, done.stdout + done.stderr
        losses.append(_losses(tmp_path / engine))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("zero2", "zero3"), ("zero3", "fsdp2"), ("fsdp2", "zero2")])
def test_a_run_goes_on_with_another_engine(organism, tmp_path, before, after):
    """Moments and all: the losses are those of a run that was never stopped, to rounding."""
    losses = {}
    for name, engines in (("straight", (after,)), ("changed", (before, after))):
        tree = tiny_config(organism, tmp_path / name)
        tree["checkpoint"] = {"every": 3, "background": False}
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(tree))
        for engine in engines:
            done = grasp_dist("naive", config, "--parallel.strategy", engine, nproc=2)
            assert done.returncode == 0, done.stdout + done.stderr
            if engine != engines[-1]:  # as if it had been killed behind step 6
                folder = tmp_path / name / "naive" / "seed-0"
                manifest = json.loads((folder / "manifest.json").read_text())
                (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
        assert ("continued behind step 6" in done.stdout) is (name == "changed")
        losses[name] = _losses(tmp_path / name)
    assert losses["changed"] == pytest.approx(losses["straight"], rel=1e-5)
