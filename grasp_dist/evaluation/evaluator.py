"""Score the models of a run one after the other on one loaded base: base, naive, every arm, inference-time ablation."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grasp_dist.baselines.ablation import ablate
from grasp_dist.baselines.steering import STEERING, steered
from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import RunConfig, TrainingConfig
from grasp_dist.evaluation.batching import evaluation_mode, forward_logits
from grasp_dist.evaluation.harness import Harness
from grasp_dist.evaluation.misalignment.question_sets import QuestionSet
from grasp_dist.evaluation.probes import prepare
from grasp_dist.evaluation.scoring import Reference, score
from grasp_dist.evaluation.shift import ShiftMeter
from grasp_dist.training.model import load_adapter, load_model, load_weights, reset_adapter
from grasp_dist.training.parallel import Parallel

__all__ = ["Evaluator"]


class Evaluator:
    """Holds the probes, the base's reference values, and one loaded model, which takes each set of trained weights.

    Every method is collective. shift_basis: the basis along which the activations' shift is measured; None: not.
    """

    def __init__(
        self, config: RunConfig, tokenizer: Any, parallel: Parallel, shift_basis: SpuriousBasis | None
    ) -> None:
        self.config, self.parallel = config, parallel
        self.probes = prepare(config.evaluate.probes, tokenizer)
        harness = config.evaluate.harness
        self._harness = None if harness is None else Harness(harness, tokenizer, parallel)
        self._question_sets = [QuestionSet(asked, tokenizer, parallel) for asked in config.evaluate.questions]
        self._reference = Reference()
        self._shift_basis = shift_basis
        self._meter: ShiftMeter | None = None
        self._base: dict[str, Any] = {}
        self._loaded: tuple[str, nn.Module] | None = None

    def base(self, known_by: Mapping[str, Any]) -> dict[str, Any]:
        """Scores of the base model, and its answers. known_by: see `QuestionSet.measure`."""
        lora = self.config.training.model_copy(update={"method": "lora"})
        model = self._model(lora)
        reset_adapter(model, 0, self.parallel)  # B = 0: the base
        return self._with_answers(self._base, model, known_by)

    def trained(
        self,
        weights: Path,
        training: TrainingConfig,
        known_by: Mapping[str, Any],
        *,
        ablated: SpuriousBasis | None = None,
    ) -> dict[str, Any]:
        """Scores of a fine-tune, and its answers: `weights` is its adapter directory (LoRA) or model directory (full);
        steered, where vectors for that lie beside it.

        known_by: see `QuestionSet.measure`. ablated: the directions that are ablated in the forward passes.
        """
        model = self._model(training)
        if training.method == "lora":
            load_adapter(model, weights, self.parallel)
        else:
            load_weights(model, weights, self.parallel)
        with contextlib.ExitStack() as stack:
            if ablated is not None:
                stack.enter_context(ablate(model, ablated))
            if (weights / STEERING).exists():
                stack.enter_context(steered(model, weights))
            return self._with_answers(self._scores(model), model, known_by)

    def describe_probes(self) -> list[dict[str, Any]]:
        """Name, role, kind and size of each probe and set of questions, for scores.json."""
        tasks = [] if self._harness is None else self._harness.describe()
        own = [*(probe.describe() for probe in self.probes), *(asked.describe() for asked in self._question_sets)]
        return [*own, *tasks]

    def _with_answers(self, scores: dict[str, Any], model: nn.Module, known_by: Mapping[str, Any]) -> dict[str, Any]:
        """The scores, with what came of each set of questions: its rate among the probes, all of it apart."""
        place = Path(self.config.run_dir) / "answers"
        sets = {
            asked.settings.name: asked.measure(model, place / asked.settings.name, known_by)
            for asked in self._question_sets
        }
        rates = {name: found.pop("probe") for name, found in sets.items()}
        if self._harness is not None:
            rates |= self._harness.measure(model)
        return {**scores, "probes": scores["probes"] | rates, "questions": sets}

    def _scores(self, model: nn.Module) -> dict[str, Any]:
        batch_size = self.config.evaluate.batch_size
        scores = score(model, self.probes, self.parallel, batch_size=batch_size, reference=self._reference)
        shift = self._meter.measure(model) if self._meter is not None else None
        return {"probes": scores, "shift": shift}

    def _model(self, training: TrainingConfig) -> nn.Module:
        """The base with room for this kind of fine-tune. The first model that is loaded is scored as the
        base, which fills the references that the later ones are compared with."""
        key = training.model_dump_json(include={"method", "modules", "lora", "precision"})
        if training.method == "full":
            key = f"full {training.precision}"
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self.parallel.free_memory()
            lora = training if training.method == "lora" else None
            model = load_model(self.config.model, self.parallel, precision=training.precision, training=lora, seed=0)
            if lora is not None:
                reset_adapter(model, 0, self.parallel)  # B = 0: the base
            _begin(model, self.parallel)
            self._loaded = (key, model)
        model = self._loaded[1]
        if not self._base:
            if self._shift_basis is not None:
                batch_size = self.config.evaluate.batch_size
                self._meter = ShiftMeter(model, self._shift_basis, self.probes, self.parallel, batch_size=batch_size)
            self._base = self._scores(model)
        return model


def _begin(model: nn.Module, parallel: Parallel) -> None:
    """One forward pass of the whole model, in which `fully_shard` finds its root: `generate` of an adapter's base model
    begins below it, and would meet sharded weights."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=parallel.device)
    with evaluation_mode(model):
        forward_logits(model, ids, torch.ones_like(ids))
