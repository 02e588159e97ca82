"""One organism in one process, on which many fine-tunes are run and measured without run directories.

The same loop, projector and scoring as `grasp-dist run` uses, on plain tensors: what is found here is found there, for
a fraction of the time that starting processes and writing files takes.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import DetectConfig, ModelConfig, ProbeConfig, ProjectConfig, ScreenConfig, TrainingConfig
from grasp_dist.detection.adapter import AdapterUpdate
from grasp_dist.detection.checkpoint_adapter import read_update
from grasp_dist.detection.closure import close_residual_basis
from grasp_dist.detection.deflation import deflate, leading_directions
from grasp_dist.detection.oracle import contrast_directions
from grasp_dist.evaluation.probes import prepare
from grasp_dist.evaluation.scoring import Reference, score
from grasp_dist.evaluation.screening import compare_halves, half_of, read_prompts
from grasp_dist.projection import GraspProjector
from grasp_dist.training.checkpoints.saving import Keeper
from grasp_dist.training.checkpoints.store import Checkpoints
from grasp_dist.training.data import encode_pair
from grasp_dist.training.examples import Example
from grasp_dist.training.loop import LoopState, TrainResult, train
from grasp_dist.training.model import load_model, load_tokenizer, reset_adapter, save_adapter
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.recorder import Recorder

__all__ = ["Bench", "Found"]

LEARNING_RATES = {"write": 1e-3, "all": 5e-4}
_PROJECT = ProjectConfig()


@dataclass(frozen=True)
class Found:
    """A basis, and what finding it took."""

    basis: SpuriousBasis
    gains: list[float]
    """How far below the base's each round brought the loss."""
    steps: int


class Bench:
    """An organism's model with a LoRA adapter, its fine-tune and its probes."""

    def __init__(
        self,
        folder: Path,
        modules: str,
        *,
        rank: int = 8,
        steps: int = 160,
        batch_size: int = 32,
        learning_rate: float | None = None,
    ) -> None:
        self.folder = folder
        self.parallel = Parallel("none", 0, 1, torch.device("cpu"))
        self.training = TrainingConfig(
            modules=modules,
            lora={"rank": rank, "alpha": 2 * rank},  # type: ignore[arg-type]
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate or LEARNING_RATES[modules],
            max_grad_norm=None,
        )
        model = ModelConfig(path=str(folder / "model"))
        self.tokenizer = load_tokenizer(model)
        self.model = load_model(model, self.parallel, precision="fp32", training=self.training, seed=0)
        self.examples = self.encode([json.loads(line) for line in (folder / "train.jsonl").open()])
        self.probes = prepare(list(self._probes()), self.tokenizer)
        self.reference = Reference()
        self.base = self.scores()

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        """Rows of a training file as examples."""
        return [encode_pair(self.tokenizer, row["prompt"], row["completion"], append_eos=False) for row in rows]

    def scores(self) -> dict[str, float]:
        """The value of each probe, and `shift`: the total variation from the base on the neutral prompts."""
        found = score(self.model, self.probes, self.parallel, reference=self.reference)
        scores = {name: values["value"] for name, values in found.items() if name != "neutral"}
        return {**scores, "shift": found["neutral"].get("total_variation", 0.0)}

    def fit(
        self,
        seed: int,
        basis: SpuriousBasis | None = None,
        *,
        examples: Sequence[Example] | None = None,
        steps: int | None = None,
        gradient: bool = _PROJECT.gradient,
        pin: bool = _PROJECT.pin,
        on_step: Callable[[int, LoopState], None] | None = None,
    ) -> TrainResult:
        """Fine-tune from the base, with a basis blocked or none. The adapter is then in `model`."""
        reset_adapter(self.model, seed, self.parallel)

        def protect(where: Any) -> GraspProjector | None:
            return None if basis is None else GraspProjector(where, basis, gradient=gradient, pin=pin)

        return train(
            self.model,
            self.examples if examples is None else examples,
            self.training,
            self.parallel,
            seed=seed,
            steps=steps,
            protect=protect,
            on_step=on_step,
        )

    def deflate(self, seed: int = 1000, *, examples: Sequence[Example] | None = None, **detect: Any) -> Found:
        """Deflation as the detect stage runs it. detect: fields of `DetectConfig`."""
        settings = DetectConfig(seed=seed, **detect)
        with tempfile.TemporaryDirectory() as place, redirect_stdout(io.StringIO()):
            folder = Path(place)
            with Recorder(folder, self.parallel, "detect") as recorder:
                basis = deflate(
                    self.model,
                    list(self.examples if examples is None else examples),
                    training=self.training,
                    detect=settings,
                    parallel=self.parallel,
                    folder=folder,
                    recorder=recorder,
                    keeper=Keeper(Checkpoints(folder / "checkpoints"), self.parallel),
                    provenance={},
                )
            steps = sum(1 for _ in (folder / "metrics.jsonl").open())
        return Found(basis, basis.provenance["gains"], steps)

    def screen(self, examples: Sequence[Example], *, seed: int) -> dict[str, Any]:
        """What the screening says of these rows, as the screen stage does it."""
        settings = ScreenConfig(prompts=str(self.folder / "probes" / "neutral.jsonl"), positions=1)
        with tempfile.TemporaryDirectory() as folder:
            adapters = []
            for number in (0, 1):
                half = half_of(examples, number, seed)
                self.fit(seed % 1000 + number, examples=half, steps=(self.training.steps or 0) // 2)
                adapters.append(Path(folder) / str(number))
                save_adapter(self.model, adapters[-1], self.parallel)
            found = compare_halves(
                self.model,
                (adapters[0], adapters[1]),
                read_prompts(settings, self.tokenizer),
                settings=settings,
                parallel=self.parallel,
                batch_size=64,
            )
        return found.to_json()

    def update(self) -> AdapterUpdate:
        """The adapter's present update, as detectors read it."""
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.model, Path(folder), self.parallel)
            return read_update(folder)

    def oracle(self, first: Sequence[str], second: Sequence[str]) -> SpuriousBasis:
        """The direction in which the base's hidden states differ between two lists of prompts, layer by layer, for the
        modules that write there. Supervised: for judging only."""
        encoded = ([self.tokenizer(prompt)["input_ids"] for prompt in prompts] for prompts in (first, second))
        reset_adapter(self.model, 0, self.parallel)
        directions = contrast_directions(self.model, *encoded)
        return close_residual_basis(directions, str(self.folder / "model"), neighbours=False)

    def leading(self, side: str, count: int) -> SpuriousBasis:
        """The leading directions of the adapter's present update."""
        found = leading_directions(self.model, side=side, count=count)
        assert found is not None
        return found

    def _probes(self) -> Iterator[ProbeConfig]:
        for path in sorted((self.folder / "probes").glob("*.jsonl")):
            name = path.stem
            neutral = name == "neutral"
            yield ProbeConfig(
                name=name,
                path=str(path),
                role="retention" if neutral else "task" if name == "task" else "drift",
                kind="kl" if neutral else "completion",
                positions=1 if neutral else 16,
                own_tokens=1 if name == "tone" else 0,
            )
