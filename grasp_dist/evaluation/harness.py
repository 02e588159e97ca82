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
        self._sizes: dict[str, int] = {}

    def check(self) -> None:
        """Load the tasks with their data: what is missing, or cannot be reached, is said before anything is trained.

        Raises `InputError` for such a task, and for one without the metric that the settings name.
        """
        from lm_eval.tasks import get_task_dict

        for name in self.settings.tasks:
            try:
                with _quiet():
                    loaded = get_task_dict([name], self._tasks)
            except Exception as error:  # of datasets, hubs and the task's own code, each with classes of its own
                raise InputError(f"evaluate.harness: task {name!r} does not load: {error}") from error
            task = loaded.get(name)
            if hasattr(task, "aggregation"):
                self._metric(name, list(task.aggregation()))

    def describe(self) -> list[dict[str, Any]]:
        """{name, role, kind, n} of each task, for scores.json; after `measure`."""
        return [
            {"name": name, "role": self.settings.role, "kind": KIND, "n": self._sizes.get(name, 0)}
            for name in self.settings.tasks
        ]

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
        sizes = found["n-samples"]
        self._sizes = {name: int(sizes[name]["effective"]) for name in settings.tasks if name in sizes}
        return {name: self._chosen(name, found["results"][name]) for name in settings.tasks}

    def _metric(self, name: str, there: list[str]) -> str:
        asked = self.settings.metric
        if asked is not None and asked not in there:
            raise InputError(f"evaluate.harness: task {name!r} has no metric {asked!r}; it has {', '.join(there)}")
        if not there:
            raise InputError(f"evaluate.harness: task {name!r} has no metric")
        return asked or next((one for one in _PREFERRED if one in there), there[0])

    def _chosen(self, name: str, results: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        for key, value in results.items():
            metric = key.partition(",")[0]
            if isinstance(value, (int, float)) and metric not in ("alias", "sample_len"):
                (errors if metric.endswith("_stderr") else values)[metric.removesuffix("_stderr")] = float(value)
        metric = self._metric(name, list(values))
        error = errors.get(metric, math.nan)
        return {
            **values,
            "value": values[metric],
            "metric": metric,
            "stderr": error if math.isfinite(error) else None,
            "rows": [],
        }


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
