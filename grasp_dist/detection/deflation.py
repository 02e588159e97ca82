"""Deflation: find the routes that a fine-tune takes, by probing again with what was found so far blocked. Ours.

A LoRA fine-tune of the base model is run; the leading singular vectors of each weight's update `s B A` join that
weight's basis and are blocked by the projector, and the search goes on:

- *warm* (the default): one run of the naive length. Every `steps_per_round` steps the current update's leading
  directions join, A and B are projected off them, and the run continues with the same optimizer state.
- *restarted*: every round starts from the base model with a fresh seed. `rounds * steps_per_round` steps in all.

After each round what was found is written to `rounds/round-NNN/` (the warm run's training state with it), so that an
interrupted detection continues behind its last finished round. LoRA factors are gathered one weight at a time,
(out + in) * r numbers; no (out, in) matrix is formed on any rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grasp_dist.architecture import canonical_name
from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import DetectConfig, TrainingConfig
from grasp_dist.detection.svd import low_rank_svd
from grasp_dist.errors import InputError
from grasp_dist.manifest import write_json
from grasp_dist.projection import GraspProjector
from grasp_dist.training.checkpoints import is_valid, load_checkpoint, save_checkpoint
from grasp_dist.training.data import Example
from grasp_dist.training.loop import LoopState, num_steps, train
from grasp_dist.training.model import reset_adapter
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.recorder import Recorder

__all__ = ["deflate", "leading_directions"]

_ADAPTER = "default"
_COMMITTED, _NEW, _STATE = "committed.json", "new.safetensors", "state"
# An update whose largest singular value is below this share of the largest of all weights points nowhere.
_NOTHING_LEARNT = 1e-6


def deflate(
    model: nn.Module,
    examples: list[Example],
    *,
    training: TrainingConfig,
    detect: DetectConfig,
    parallel: Parallel,
    folder: Path,
    recorder: Recorder,
    provenance: dict[str, Any],
) -> SpuriousBasis:
    """The basis that `detect.rounds` rounds of deflation find; collective.

    `model` is a PEFT LoRA model as `load_model` makes it; its adapter is trained and must be reset before other use.
    `folder` keeps the rounds. Raises `InputError` when a round's update is zero everywhere.
    """
    search = _Search(model, detect, parallel, folder / "rounds")
    if detect.method == "warm":
        _warm(search, examples, training, recorder)
    else:
        _restarted(search, examples, training, recorder)
    return search.combined(provenance)


def _warm(search: _Search, examples: list[Example], training: TrainingConfig, recorder: Recorder) -> None:
    detect = search.detect
    per_round = detect.steps_per_round or max(1, num_steps(training, len(examples)) // detect.rounds)
    reset_adapter(search.model, detect.seed, search.parallel)
    done = search.resume()
    projector = GraspProjector(search.model, search.combined() if done else None)

    def on_start(state: LoopState) -> None:
        if done:
            folder = search.round_folder(done) / _STATE
            state.restore(load_checkpoint(folder, search.model, state.optimizer, projector, search.parallel))

    def on_step(step: int, state: LoopState) -> None:
        if step % per_round:
            return
        number = step // per_round
        projector.extend(search.add_round(number))
        if number < detect.rounds:
            folder = search.round_folder(number) / _STATE
            save_checkpoint(folder, search.model, state.optimizer, projector, state.extra(), search.parallel)
        search.commit(number)
        recorder.event(f"round {number} of {detect.rounds}: {len(search.rounds[-1])} weights gained directions")

    if done < detect.rounds:
        train(
            search.model,
            examples,
            training,
            search.parallel,
            seed=detect.seed,
            steps=per_round * detect.rounds,
            recorder=recorder,
            projector=projector,
            on_start=on_start,
            on_step=on_step,
        )


def _restarted(search: _Search, examples: list[Example], training: TrainingConfig, recorder: Recorder) -> None:
    detect = search.detect
    steps = detect.steps_per_round or 60
    done = search.resume()
    recorder.skip(done * steps)
    for number in range(done + 1, detect.rounds + 1):
        seed = detect.seed + number - 1
        reset_adapter(search.model, seed, search.parallel)
        projector = GraspProjector(search.model, search.combined()) if search.rounds else None
        train(
            search.model,
            examples,
            training,
            search.parallel,
            seed=seed,
            steps=steps,
            recorder=recorder,
            projector=projector,
        )
        search.add_round(number)
        search.commit(number)
        recorder.event(f"round {number} of {detect.rounds}: {len(search.rounds[-1])} weights gained directions")


class _Search:
    """What was found so far: one small basis per round, in the rounds' folders and open for reading."""

    def __init__(self, model: nn.Module, detect: DetectConfig, parallel: Parallel, folder: Path) -> None:
        self.model, self.detect, self.parallel, self.folder = model, detect, parallel, folder
        self.rounds: list[SpuriousBasis] = []

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number:03d}"

    def resume(self) -> int:
        """Open the rounds that can be continued from after an interruption; returns how many.

        Those are the committed ones, up to the last whose training state is whole (a restarted search has none). What
        lies behind them is removed, to be made again. Rank 0 looks; collective.
        """
        done = 0
        if self.parallel.is_main:
            while done < self.detect.rounds and (self.round_folder(done + 1) / _COMMITTED).exists():
                done += 1
            if self.detect.method == "warm" and done < self.detect.rounds:
                while done and not is_valid(self.round_folder(done) / _STATE):
                    done -= 1
            for number in range(done + 1, self.detect.rounds + 1):
                shutil.rmtree(self.round_folder(number), ignore_errors=True)
        done = self.parallel.broadcast_object(done)
        self.rounds = [SpuriousBasis.load(self.round_folder(number) / _NEW) for number in range(1, done + 1)]
        return done

    def add_round(self, number: int) -> SpuriousBasis:
        """Write the leading directions of the adapter's present update, and open them on every rank."""
        path = self.round_folder(number) / _NEW
        found = leading_directions(
            self.model, side=self.detect.side, count=self.detect.directions_per_round, keep=self.parallel.is_main
        )
        self._on_main(lambda: found.save(path) if found is not None else None)
        self.rounds.append(SpuriousBasis.load(path))
        return self.rounds[-1]

    def commit(self, number: int) -> None:
        """Make the round one that can be continued from. Training states but the last two are removed."""
        self._on_main(lambda: write_json(self.round_folder(number) / _COMMITTED, {"round": number}))
        if self.parallel.is_main and number > 2:
            shutil.rmtree(self.round_folder(number - 2) / _STATE, ignore_errors=True)

    def _on_main(self, write: Callable[[], None]) -> None:
        """Let rank 0 write; if it cannot, every rank raises."""
        error = None
        if self.parallel.is_main:
            try:
                write()
            except InputError as caught:
                error = caught
        self.parallel.share_error(error)

    def combined(self, provenance: dict[str, Any] | None = None) -> SpuriousBasis:
        """All rounds as one basis, columns in order of discovery. A round's directions are orthogonal to the earlier
        ones because those were blocked; the rounding left in that is taken out here."""
        basis = self.rounds[0]
        for more in self.rounds[1:]:
            basis = basis.union(more)
        found = basis.with_provenance()
        # Instead of the rounds' own, which union collects.
        found.provenance = {"method": "deflation", **(provenance or {}), "leading_share": self._concentration()}
        return found

    def _concentration(self) -> dict[str, float]:
        """How concentrated each weight's updates were: mean over rounds of the new directions' share of the energy."""
        found: dict[str, list[float]] = {}
        for basis in self.rounds:
            for weight, share in basis.provenance["leading_share"].items():
                found.setdefault(weight, []).append(share)
        return {weight: sum(shares) / len(shares) for weight, shares in found.items()}


def leading_directions(model: nn.Module, *, side: str, count: int, keep: bool = True) -> SpuriousBasis | None:
    """The `count` leading singular vectors of every adapted weight's present update `s B A`; collective.

    side: "write" (left vectors, (out, count)), "read" (right, (in, count)) or "both". Ranks with `keep=False` take part
    in gathering the factors and return None. A weight whose update is negligible beside the largest is left
    out; raises `InputError` when none moved at all. provenance["leading_share"]: energy of the directions by weight.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, int]] = {}
    shares: dict[str, float] = {}
    for weight, factor_a, factor_b, scale in _factors(model):
        a, b = _whole(factor_a), _whole(factor_b)
        if not keep:
            continue
        left, sigma, right = low_rank_svd(a, b, scale)
        take = max(1, min(count, int((sigma > _NOTHING_LEARNT * sigma[0]).sum())))
        values[weight] = sigma[:take]
        energy = sigma.double().square()
        shares[weight] = float(energy[:take].sum() / energy.sum().clamp_min(1e-300))
        shapes[weight] = (b.shape[0], a.shape[1])
        if side in ("write", "both"):
            tensors[f"{weight}.write"] = left[:, :take]
        if side in ("read", "both"):
            tensors[f"{weight}.read"] = right[:, :take]
    if not keep:
        return None
    largest = max((float(sigma[0]) for sigma in values.values()), default=0.0)
    if not largest > 0:
        raise InputError(
            "detection found no direction: the probe fine-tune changed no weight; raise training.learning_rate"
        )
    moved = {weight for weight, sigma in values.items() if float(sigma[0]) > _NOTHING_LEARNT * largest}
    return SpuriousBasis.from_tensors(
        {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in moved},
        singular_values={weight: values[weight] for weight in moved},
        shapes={weight: shapes[weight] for weight in moved},
        provenance={"leading_share": {weight: shares[weight] for weight in sorted(moved)}},
    )


def _factors(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    for name, module in model.named_modules():
        factors = getattr(module, "lora_A", None)
        if isinstance(factors, nn.ModuleDict) and _ADAPTER in factors:
            weight = f"{canonical_name(name)}.weight"
            layer: Any = module
            yield weight, layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight, float(layer.scaling[_ADAPTER])


def _whole(factor: Tensor) -> Tensor:
    tensor = factor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
