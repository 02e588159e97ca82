"""Tasks of the lm-evaluation-harness (extra `eval`) on the model that a run scores, through its Python API.

Every rank answers every request, since a sharded model's forward pass is collective: results are those of one process,
and take as long as there.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from grasp_dist.errors import InputError
from grasp_dist.evaluation.batching import evaluation_mode
from grasp_dist.evaluation.settings import HarnessConfig
from grasp_dist.training.parallel import Parallel

__all__ = ["KIND", "Harness"]

KIND = "harness"
"""Among the kinds of probes."""
_PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "bleu", "rouge1", "mc2")
"""Of a task's metrics, the one that stands in tables, where the settings name none."""


class Harness:
    """The tasks of one run. Raises `InputError` for a task that is not known, and where the package is missing."""

    def __init__(self, settings: HarnessConfig, tokenizer: Any, parallel: Parallel) -> None:
        self.settings, self._tokenizer, self._parallel = settings, tokenizer, parallel
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InputError("evaluate.harness needs lm-eval; pip install 'grasp-dist[eval]'") from None
        with _quiet():
            # Those of lm-eval itself are ten thousand files, read in a quarter of a minute.
            own = settings.include_path and TaskManager(include_path=settings.include_path, include_defaults=False)
            if own and set(settings.tasks) <= set(own.all_tasks):
                self._tasks = own
            else:
                self._tasks = TaskManager(include_path=settings.include_path)
        unknown = [name for name in settings.tasks if name not in self._tasks.all_tasks]
        if unknown:
            where = f" and {settings.include_path}" if settings.include_path else ""
            raise InputError(f"evaluate.harness: lm-eval{where} has no task {unknown[0]!r}; see `lm-eval ls tasks`")
        self._found: dict[str, dict[str, Any]] = {}

    def check(self) -> None:
        """Load the tasks with their data: what is missing, or cannot be reached, is said before anything is trained.

        Raises `InputError` for such a task, for one that could not be scored in the end, and for one without the metric
        that the settings name.
        """
        in_which: dict[str, str] = {}
        for name in self.settings.tasks:
            try:
                with _quiet():
                    loaded = self._tasks.load([name])
            except Exception as error:  # of datasets, hubs and the task's own code, each with classes of its own
                raise InputError(f"evaluate.harness: task {name!r} does not load: {error}") from error
            there = ", ".join(loaded["tasks"])
            group = loaded.get("groups", {}).get(name)
            if group is None and name not in loaded["tasks"]:
                raise InputError(f"evaluate.harness: {name!r} is a tag of several tasks; name those: {there}")
            if group is not None and not group.aggregate_metric_list:
                raise InputError(
                    f"evaluate.harness: the group {name!r} has no figure of its own; name its tasks: {there}"
                )
            for part, task in loaded["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise InputError(
                        f"evaluate.harness: task {part!r} runs code that the model writes, which is not done"
                    )
                if getattr(task, "OUTPUT_TYPE", None) == "generate_until" and self._tokenizer.eos_token_id is None:
                    raise InputError(f"evaluate.harness: task {part!r} needs a tokenizer with an end-of-text token")
                if in_which.setdefault(part, name) != name:
                    raise InputError(f"evaluate.harness: task {part!r} is in {in_which[part]!r} and in {name!r}")
            if group is not None:
                self._metric(name, [one.metric for one in group.aggregate_metric_list])
            else:
                self._metric(name, _metrics_of(loaded["tasks"][name]))

    def describe(self) -> list[dict[str, Any]]:
        """{name, role, kind, n, higher_is_better} of each task, for scores.json; after `measure`."""
        own = {"role": self.settings.role, "kind": KIND}
        return [{"name": name, **own, **self._found.get(name, {"n": 0})} for name in self.settings.tasks]

    def measure(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """{task: {"value", "metric", "stderr", and every metric, "rows": []}}; collective."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        settings = self.settings
        with evaluation_mode(model), _quiet():
            asked: Any = HFLM(
                pretrained=model,
                tokenizer=self._tokenizer,
                batch_size=settings.batch_size,
                device=str(self._parallel.device),
            )
            # Without a group of its own it would split the requests among the ranks.
            asked._rank, asked._world_size = 0, 1
            found = simple_evaluate(
                model=asked,
                tasks=list(settings.tasks),
                task_manager=self._tasks,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                log_samples=False,
                bootstrap_iters=1000,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        # It gives results to the first process of each node alone.
        found = self._parallel.broadcast_object(found)
        chosen = {name: self._chosen(name, found["results"][name]) for name in settings.tasks}
        for name, result in chosen.items():
            better = found["higher_is_better"].get(name, {}).get(result["metric"].partition(",")[0])
            size = int(found["results"][name].get("sample_len", 0))
            self._found[name] = {"n": size, "higher_is_better": better is not False}
        return chosen

    def _metric(self, name: str, there: list[str]) -> str:
        """Of those that are there, by their names or by `name,filter`, the one that stands in tables."""
        asked = self.settings.metric
        if not there:
            raise InputError(f"evaluate.harness: task {name!r} has no metric")
        wanted = [asked] if asked is not None else [*_PREFERRED, there[0]]
        for one in wanted:
            if found := next((each for each in there if one in (each, each.partition(",")[0])), None):
                return found
        raise InputError(f"evaluate.harness: task {name!r} has no metric {asked!r}; it has {', '.join(there)}")

    def _chosen(self, name: str, results: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, (int, float)) and filtered:
                found = errors if metric.endswith("_stderr") else values
                found[_named(metric.removesuffix("_stderr"), filtered)] = float(value)
        metric = self._metric(name, list(values))
        error = errors.get(metric, math.nan)
        return {
            **values,
            "value": values[metric],
            "metric": metric,
            "stderr": error if math.isfinite(error) else None,
            "rows": [],
        }


def _metrics_of(task: Any) -> list[str]:
    filters = [one["name"] for one in getattr(task.config, "filter_list", None) or [{"name": "none"}]]
    return [_named(metric, filtered) for filtered in filters for metric in task.aggregation()]


def _named(metric: str, filtered: str) -> str:
    """A metric as settings and results name it. Tasks with several filters of the answer have one value for each."""
    return metric if filtered == "none" else f"{metric},{filtered}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's notes of every step are for its own command line."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
