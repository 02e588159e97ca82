"""Launching the tiny organism on a real Slurm: its configuration, interruptions, and a look at what came of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from tests.slurm_cluster import SlurmCluster
from tests.tiny_runs import tiny_config

STEPS = 240
EVERY = 20
TRAINED = ("naive/seed-0", "detect", "project/grasp/seed-0", "project/random/seed-0")
CLUSTER = {"train": {"nodes": 2, "tasks_per_node": 1}, "evaluate": {"nodes": 1}, "lead_seconds": 60}


def write_launch_config(organism: Path, folder: Path, **sections: Any) -> Path:
    """A run that is long enough to be interrupted, with checkpoints."""
    tree = tiny_config(organism, folder / "run")
    tree["training"]["steps"] = STEPS
    tree["checkpoint"] = {"every": EVERY}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree).replace("$", "$$"))
    return path


def steps_of(run: Path, task: str) -> int:
    """The last step that the task has recorded."""
    path = run / task / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def manifest(run: Path, task: str) -> dict[str, Any]:
    path = run / task / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def logs_of(folder: Path) -> str:
    """Every log of a launch, for a failed test to show."""
    texts = [f"== {path.name}\n{_plain(path)}" for path in sorted((folder / "logs").rglob("*")) if path.is_file()]
    return "\n".join(texts)


def _plain(path: Path) -> str:
    noise = ("WARNING", "W1", "[rank")
    return "\n".join(line for line in path.read_text(errors="replace").splitlines() if not line.startswith(noise))


def scores(run: Path) -> dict[str, Any]:
    """{model: {probe: value}} of a finished run's report."""
    rows = json.loads((run / "evaluate" / "scores.json").read_text())["models"]
    return {row["model"]: {name: probe["value"] for name, probe in row["probes"].items()} for row in rows}


def assert_same_results(run: Path, other: Path) -> None:
    """Bit for bit the same weights, bases and losses, and the same scores."""
    for task in TRAINED:
        assert_same_training(run, other, task)
    found, wanted = scores(run), scores(other)
    assert found.keys() == wanted.keys()
    for model, probes in wanted.items():
        for probe, value in probes.items():
            assert abs(found[model][probe] - value) <= 1e-5 + 1e-4 * abs(value), (model, probe)
    assert (run / "report" / "report.html").is_file()


def assert_same_training(run: Path, other: Path, task: str) -> None:
    """Bit for bit the same weights (of `detect` the basis) and losses."""
    name = "basis.safetensors" if task == "detect" else "adapter/adapter_model.safetensors"
    ours, theirs = load_file(run / task / name), load_file(other / task / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.equal(theirs[key]), (task, key)
    assert _losses(run, task) == _losses(other, task), task


def _losses(run: Path, task: str) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / task / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


class Interrupter:
    """Interrupts tasks at given steps, in turn, while the jobs run: `watch` until all are over."""

    def __init__(self, slurm: SlurmCluster, run: Path, jobs: dict[str, str]) -> None:
        """jobs: {task: job id, with `_<element>`}"""
        self._slurm, self._run, self._jobs = slurm, run, jobs
        self._left: list[tuple[str, Callable[[], bool], list[str]]] = []

    def at_step(self, task: str, step: int, *command: str) -> None:
        """Run a command of Slurm's, with the job id behind it, when the task has come to that step."""
        self._left.append((task, lambda: steps_of(self._run, task) >= step, [*command, self._jobs[task]]))

    def at_start(self, task: str, number: int, *command: str) -> None:
        """The same as soon as the job's start of that number, counted from 0, has written a line."""
        job = self._jobs[task]
        logs = self._run / "launch"
        self._left.append((task, lambda: any(logs.glob(f"*/logs/*-{job}-r{number}.log")), [*command, job]))

    def in_work(self, task: str, *command: str) -> None:
        """The same as soon as the task's manifest says that it is at work."""
        self._left.append(
            (task, lambda: manifest(self._run, task).get("status") == "running", [*command, self._jobs[task]])
        )

    def watch(self, timeout: float = 600) -> None:
        def step() -> bool:
            waiting = set()
            for item in list(self._left):
                task, ready, command = item
                if task in waiting:
                    continue
                waiting.add(task)  # one after the other
                if ready() and self._slurm.state(self._jobs[task]) == "RUNNING":
                    self._slurm.run(*command, check=False)
                    self._left.remove(item)
            return not self._slurm.queue()

        self._slurm.until(step, timeout, lambda: self._slurm.run("squeue", "-r", "-o", "%i %j %T %r %E"))
        assert not self._left, [(task, command) for task, _, command in self._left]


def elements(record: Any) -> dict[str, str]:
    """{task: job id} of what was launched."""
    return {
        task: f"{job.job_id}_{number}" if len(job.tasks) > 1 else job.job_id
        for job in record.jobs
        for number, task in enumerate(job.tasks)
    }
