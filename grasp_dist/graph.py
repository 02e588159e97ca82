"""The tasks of a run, in order: what each is made from, where it goes, and whether it has to run. Needs no torch.

naive/seed-s, naive/half-h -> screen, detect, detect_one_shot -> project/<arm>/seed-s -> evaluate/<model>/seed-s
-> report
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grasp_dist.baselines.settings import Interleaving, SafeLora, needs_naive
from grasp_dist.config import DataConfig, RunConfig, TrainingConfig
from grasp_dist.config_files import save_config
from grasp_dist.errors import InputError
from grasp_dist.evaluation.settings import JudgedByModel, JudgedByRules
from grasp_dist.manifest import Unit, digest, file_hash, quick_hash
from grasp_dist.settings import Section

__all__ = ["STAGES", "RunGraph", "Task"]

STAGES = ("naive", "detect", "project", "evaluate", "report")
BASIS_FILE, SCREEN_FILE = "basis.safetensors", "screen.json"
LOCK = ".lock"
"""Where `RunLock` keeps its files."""
_BASES = ("detected", "one_shot", "random", "none")
_MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# Settings that change speed, memory or what is printed, but the result only to rounding.
_SPEED_ONLY = {"seeds", "log_every", "micro_batch_size", "activation_checkpointing"}


@dataclass
class Task:
    """One unit of work. `output`: the file or folder in it that later tasks read; `stage`: who does it."""

    name: str
    stage: str
    unit: Unit
    output: str
    upstream: list[Task] = field(default_factory=list)
    arm: str | None = None
    model: str | None = None
    seed: int | None = None
    half: int | None = None
    """Of the data, for a fine-tune that the screening compares."""

    @property
    def path(self) -> Path:
        return self.unit.folder / self.output

    @property
    def result_hash(self) -> str | None:
        return self.unit.output_hash(self.output)


class RunGraph:
    """Every task of a run, with its inputs as they are on disk now."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.root = Path(config.run_dir)
        self._hashes: dict[Path, str] = {}

    def tasks(self, stages: tuple[str, ...] = STAGES) -> Iterator[Task]:
        """The tasks of the stages in order. A generator: a task's inputs are read when it is reached, so that what ran
        just before it counts."""
        for stage in STAGES:
            if stage in stages:
                yield from getattr(self, f"_{stage}_tasks")()

    def plan(self, stages: tuple[str, ...] = STAGES) -> list[tuple[Task, str | None]]:
        """Each task with None (finished and fresh) or the reason why it will run."""
        reasons: dict[str, str | None] = {}
        plan = []
        for task in self.tasks(stages):
            follows = next((up.name for up in task.upstream if reasons.get(up.name)), None)
            reason = task.unit.stale_because()
            if follows and (reason is None or reason.startswith("its inputs changed")):
                reason = f"follows {follows}"
            reasons[task.name] = reason
            plan.append((task, reason))
        return plan

    def is_stale(self, task: Task) -> bool:
        """Whether the task, or anything that it is made from, has to run."""
        return task.unit.stale_because() is not None or any(self.is_stale(up) for up in task.upstream)

    def require(self, task: Task) -> None:
        """Raise `InputError` when something that the task is made from is not there, or not up to date."""
        for up in task.upstream:
            if (reason := up.unit.stale_because()) is not None:
                raise InputError(
                    f"{task.name} needs {up.name}, which has to run first in {self.root} ({reason}); "
                    f"run `grasp-dist {up.stage} CONFIG`, or `grasp-dist run CONFIG` for all stages"
                )
            self.require(up)

    def check_claim(self) -> None:
        """Check that the run directory is this run's, or new.

        Raises `InputError` for a folder that is no run directory, or one made from another model or data set.
        """
        saved = self.root / "config.yaml"
        if saved.exists():
            try:
                old = yaml.safe_load(saved.read_text())
                made = {key: old[key]["path"] for key in ("model", "data")}
            except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
                raise InputError(
                    f"{saved} cannot be read as a run's configuration ({error}); choose another run_dir"
                ) from None
            for key, path in made.items():
                now = getattr(self.config, key).path
                if path != now:
                    raise InputError(
                        f"the run directory {self.root} was made with {key}.path {path}, and this configuration has "
                        f"{now}; choose another run_dir (--run_dir ...), so that nothing there is mixed up or lost"
                    )
        elif self.root.exists() and (not self.root.is_dir() or any(path.name != LOCK for path in self.root.iterdir())):
            raise InputError(
                f"{self.root} exists and is not a run directory (it has no config.yaml); choose another run_dir"
            )

    def claim(self) -> None:
        """`check_claim`, and save the resolved configuration in the run directory."""
        self.check_claim()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.root / "config.yaml")
        except OSError as error:
            raise InputError(
                f"cannot write to the run directory {self.root}: {error.strerror}; choose another run_dir"
            ) from None

    def arm_basis(self, arm: str) -> Task | Path | None:
        """Where an arm's basis comes from: a detection task, a file, or None for an unprotected arm."""
        source = self.config.project.arms[arm].basis
        if source == "none":
            return None
        if source in ("detected", "random"):
            return self.detect_task()
        if source == "one_shot":
            return self.one_shot_task()
        if not Path(source).is_file():
            near = difflib.get_close_matches(source, _BASES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"a file is what is none of {', '.join(_BASES)}"
            raise InputError(f"project.arms.{arm}.basis: there is no file {source}; {hint}")
        return Path(source)

    def needs_one_shot(self) -> bool:
        return any(arm.basis == "one_shot" for arm in self.config.project.arms.values())

    # The tasks

    def _naive_tasks(self) -> Iterator[Task]:
        yield from self._seed_tasks()
        if self.config.detect.screen is not None:
            yield from self._half_tasks()

    def _half_tasks(self) -> Iterator[Task]:
        training, split = self.config.half_training(), self.config.detect.seed
        for half in (0, 1):
            inputs = {**self._training_inputs(training), "half": half, "split": split, "seed": split + half}
            yield self._task(
                "naive", f"naive/half-{half}", inputs, _weights_folder(training), seed=split + half, half=half
            )

    def _seed_tasks(self) -> Iterator[Task]:
        for seed in self.config.training.seeds:
            inputs = {**self._training_inputs(self.config.training), "seed": seed}
            yield self._task(
                "naive", f"naive/seed-{seed}", inputs, _weights_folder(self.config.training), model="naive", seed=seed
            )

    def naive_task(self, seed: int) -> Task:
        return next(task for task in self._seed_tasks() if task.seed == seed)

    def _detect_tasks(self) -> Iterator[Task]:
        if self.config.detect.screen is not None:
            yield self.screen_task()
        yield self.detect_task()
        if self.needs_one_shot():
            yield self.one_shot_task()

    def detect_task(self) -> Task:
        detect = self.config.detect
        if detect.method == "one_shot":
            return self.one_shot_task("detect")
        if detect.method == "file":
            inputs: dict[str, Any] = {"basis": self._hash(Path(detect.basis or ""))}
            return self._task("detect", "detect", {"method": "file", **inputs}, BASIS_FILE)
        settings = detect.model_dump(exclude={"basis", "adapter", "rank", "screen"})
        inputs = {**self._training_inputs(self.config.training), "detect": settings}
        upstream = []
        if detect.screen is not None:
            upstream = [self.screen_task()]
            inputs["screen"] = upstream[0].result_hash
        return self._task("detect", "detect", inputs, BASIS_FILE, upstream=upstream)

    def screen_task(self) -> Task:
        settings = self.config.detect.screen
        assert settings is not None
        halves = list(self._half_tasks())
        inputs = {
            **settings.model_dump(exclude={"prompts"}),
            "prompts": self._hash(Path(settings.prompts or "")),
            "model": self._model_hash(),
            "precision": self.config.training.precision,
            "halves": [task.result_hash for task in halves],
        }
        return self._task("detect", "screen", inputs, SCREEN_FILE, upstream=halves)

    def one_shot_task(self, name: str = "detect_one_shot") -> Task:
        detect = self.config.detect
        inputs: dict[str, Any] = {"method": "one_shot", "rank": detect.rank, "side": detect.side}
        upstream = []
        if detect.adapter:
            inputs["adapter"] = self._folder_hash(Path(detect.adapter), "*.safetensors")
        else:
            upstream = [self.naive_task(self.config.training.seeds[0])]
            inputs["adapter"] = upstream[0].result_hash
        return self._task("detect", name, inputs, BASIS_FILE, upstream=upstream)

    def _project_tasks(self) -> Iterator[Task]:
        for arm in self.config.project.arms:
            training = self.config.arm_training(arm)
            for seed in self.config.training.seeds:
                basis = self.arm_basis(arm)
                inputs = {**self._training_inputs(training), "seed": seed, "arm": self.arm_settings(arm)}
                inputs["data"] = self._data_inputs(self.config.arm_data(arm))
                upstream = []
                if isinstance(basis, Task):
                    inputs["basis"] = basis.result_hash
                    upstream = [basis]
                elif basis is not None:
                    inputs["basis"] = self._hash(basis)
                if (check := self.config.checked(arm)) is not None:
                    upstream = [*upstream, self.naive_task(seed)]
                    inputs["check"] = {
                        **check.model_dump(exclude={"prompts"}),
                        "prompts": self._hash(Path(check.prompts or "")),
                        "naive": upstream[-1].result_hash,
                    }
                if (alternative := self.config.project.arms[arm].alternative) is not None:
                    inputs["alternative"] = self._alternative_inputs(alternative)
                    if needs_naive(alternative):
                        upstream = [self.naive_task(seed)]
                        inputs["naive"] = upstream[0].result_hash
                yield self._task(
                    "project",
                    f"project/{arm}/seed-{seed}",
                    inputs,
                    _weights_folder(training),
                    upstream=upstream,
                    arm=arm,
                    model=arm,
                    seed=seed,
                )

    def arm_settings(self, arm: str) -> dict[str, Any]:
        """Source, side, rank, gradient and pin of an arm, with the defaults of `project` filled in."""
        own, project = self.config.project.arms[arm], self.config.project
        chosen = {
            key: getattr(project, key) if getattr(own, key) is None else getattr(own, key)
            for key in ("side", "rank", "gradient", "pin")
        }
        return {"basis": own.basis, **chosen}

    def _evaluate_tasks(self) -> Iterator[Task]:
        common = {
            "model": self._model_hash(),
            "precision": self.config.training.precision,
            "probes": self._probe_inputs(),
            "shift": self.config.evaluate.shift,
            **self._question_inputs(),
            **self._harness_inputs(),
        }
        detect = self.detect_task()
        basis = {"basis": detect.result_hash} if self.config.evaluate.shift else {}
        after = [detect] if self.config.evaluate.shift else []
        yield self._task("evaluate", "evaluate/base", {**common, **basis}, "scores.json", upstream=after, model="base")
        trained = [*self._seed_tasks(), *self._project_tasks()]
        for task in trained:
            inputs = {**common, **basis, "weights": task.result_hash}
            yield self._evaluation_of(task, str(task.model), inputs, after)
        if self.config.evaluate.ablation:
            for task in self._seed_tasks():
                settings = {"side": self.config.project.side, "rank": self.config.project.rank}
                inputs = {**common, "basis": detect.result_hash, "weights": task.result_hash, "ablation": settings}
                yield self._evaluation_of(task, "ablation", inputs, [detect])

    def _evaluation_of(self, task: Task, model: str, inputs: dict[str, Any], after: list[Task]) -> Task:
        name = f"evaluate/{model}/seed-{task.seed}"
        return self._task(
            "evaluate", name, inputs, "scores.json", upstream=[task, *after], arm=task.arm, model=model, seed=task.seed
        )

    def _report_tasks(self) -> Iterator[Task]:
        evaluations = list(self._evaluate_tasks())
        inputs = {
            "report": self.config.report.model_dump(),
            "scores": {task.name: task.result_hash for task in evaluations},
        }
        yield self._task("report", "report", inputs, f"{self.config.report.name}.html", upstream=evaluations)

    # Their inputs

    def _task(self, stage: str, name: str, inputs: dict[str, Any], output: str, **rest: Any) -> Task:
        return Task(name=name, stage=stage, unit=Unit(self.root / name, inputs), output=output, **rest)

    def _training_inputs(self, training: TrainingConfig) -> dict[str, Any]:
        return {
            "model": self._model_hash(),
            "data": self._data_inputs(self.config.data),
            "training": training.model_dump(exclude=_SPEED_ONLY),
        }

    def _model_hash(self) -> str:
        model = self.config.model
        if Path(model.path).is_dir():
            weights = self._folder_hash(Path(model.path), *_MODEL_FILES)
        else:
            weights = f"{model.path}@{model.revision or 'main'}"
        tokenizer = model.tokenizer
        if tokenizer and Path(tokenizer).is_dir():
            tokenizer = self._folder_hash(Path(tokenizer), *_MODEL_FILES)
        return digest([weights, tokenizer, model.attention])

    def _data_inputs(self, data: DataConfig) -> dict[str, Any]:
        settings = data.model_dump(exclude={"path"})
        path = Path(data.path)
        if path.is_file():
            return {**settings, "content": self._hash(path)}
        if path.is_dir():
            return {**settings, "content": self._folder_hash(path, "*")}
        return {**settings, "content": data.path}

    def _probe_inputs(self) -> list[dict[str, Any]]:
        return [
            {**probe.model_dump(exclude={"path"}), "content": self._hash(Path(probe.path))}
            for probe in self.config.evaluate.probes
        ]

    def _harness_inputs(self) -> dict[str, Any]:
        harness = self.config.evaluate.harness
        if harness is None:
            return {}
        if harness.include_path is not None and not Path(harness.include_path).is_dir():
            raise InputError(f"evaluate.harness.include_path {harness.include_path} is no directory")
        own = None if harness.include_path is None else self._folder_hash(Path(harness.include_path), "**/*")
        return {"harness": {**harness.model_dump(exclude={"include_path", "batch_size"}), "own": own}}

    def _question_inputs(self) -> dict[str, Any]:
        """Nothing where nothing is asked, so that runs without questions stay as they were made."""
        sets = []
        for asked in self.config.evaluate.questions:
            judge = asked.judge
            by = judge.model_dump(exclude={"path", "address", "key_variable", "at_once", "per_minute"})
            if isinstance(judge, JudgedByRules):
                by["content"] = self._hash(Path(judge.path))
            elif isinstance(judge, JudgedByModel):
                path = Path(judge.path)
                by["content"] = self._folder_hash(path, *_MODEL_FILES) if path.is_dir() else judge.path
            settings = asked.model_dump(exclude={"path", "judge"})
            sets.append({**settings, "judge": by, "content": self._hash(Path(asked.path))})
        return {"questions": sets} if sets else {}

    def _alternative_inputs(self, alternative: Section) -> dict[str, Any]:
        """Its settings, with the content of what they name in the place of paths."""
        inputs = alternative.model_dump(exclude={"path", "unaligned"})
        if isinstance(alternative, Interleaving):
            inputs["content"] = self._data_inputs(self.config.data.model_copy(update={"path": alternative.path}))
        elif isinstance(alternative, SafeLora):
            inputs["unaligned"] = self._folder_hash(Path(alternative.unaligned), *_MODEL_FILES)
        return inputs

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            try:
                self._hashes[path] = file_hash(path)
            except OSError as error:
                raise InputError(f"cannot read {path}: {error.strerror}; check the path in the configuration") from None
        return self._hashes[path]

    def _folder_hash(self, folder: Path, *patterns: str) -> str:
        if folder not in self._hashes:
            found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
            files = sorted(path for path in found if "__pycache__" not in path.parts)
            if not files:
                raise InputError(f"{folder} holds no {' or '.join(patterns)} file; check the path in the configuration")
            self._hashes[folder] = digest({str(file.relative_to(folder)): quick_hash(file) for file in files})
        return self._hashes[folder]


def _weights_folder(training: TrainingConfig) -> str:
    return "adapter" if training.method == "lora" else "model"
