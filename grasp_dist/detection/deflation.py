"""Deflation: find the routes that a fine-tune takes, by probing again with what was found so far blocked. Ours.

A LoRA fine-tune of the base model is run; the leading singular vectors of each weight's update `s B A` join that
weight's basis and are blocked by the projector, and the search goes on:

- *warm* (the default): one run of the naive length. Every `steps_per_round` steps the current update's leading
  directions join, A and B are projected off them, and the run continues with the same optimizer state.
- *restarted*: every round starts from the base model with a fresh seed. `rounds * steps_per_round` steps in all. With
  `probe_seeds`, so many probes that differ in their seeds make a round, and only directions join on which they agree
  beyond chance (`probe_agreement.py`); a round in which they agree on nothing is the last.

With `stop_gain` the search ends by itself, without labels or other data. A round's *gain* is how far it brings the loss
below the base's. While a route is open the probe takes it and gains; once the routes are blocked, what the probe can
still learn within a round is little. So the second of two rounds in a row whose gains are below that share of the
largest gain of any round is the last. Two, because a single round may have had hard batches; and four at least, because
a learning rate that warms up gains little at first.

After each round what was found is written to `rounds/round-NNN/`, and the warm run's training state is kept like that
of every training run, so that an interrupted detection continues: a warm one behind its last checkpoint, a restarted
one behind its last finished round. LoRA factors are gathered one weight at a time, (out + in) * r numbers; no (out, in)
matrix is formed on any rank.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grasp_dist.architecture import canonical_name
from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import DetectConfig, TrainingConfig
from grasp_dist.detection.probe_agreement import agreed_directions
from grasp_dist.detection.svd import low_rank_svd
from grasp_dist.errors import InputError
from grasp_dist.manifest import write_json
from grasp_dist.projection import GraspProjector
from grasp_dist.training.checkpoints.saving import Keeper
from grasp_dist.training.data import Example
from grasp_dist.training.loop import LoopState, num_steps, train
from grasp_dist.training.model import reset_adapter
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.recorder import Recorder
from grasp_dist.training.sharding import whole_tensor

__all__ = ["deflate", "leading_directions", "nothing_left", "round_gain"]

_ADAPTER = "default"
_COMMITTED, _NEW = "committed.json", "new.safetensors"
# An update whose largest singular value is below this share of the largest of all weights points nowhere.
_NOTHING_LEARNT = 1e-6
_EARLIEST = 4
"""The first round that may be the last."""


def deflate(
    model: nn.Module,
    examples: list[Example],
    *,
    training: TrainingConfig,
    detect: DetectConfig,
    parallel: Parallel,
    folder: Path,
    recorder: Recorder,
    keeper: Keeper,
    provenance: dict[str, Any],
) -> SpuriousBasis:
    """The basis that `detect.rounds` rounds of deflation find; collective.

    `model` is a PEFT LoRA model as `load_model` makes it; its adapter is trained and must be reset before other use.
    `folder` keeps the rounds, and `keeper` the warm run's checkpoints. Raises `InputError` when a round's update is
    zero everywhere.
    """
    search = _Search(model, detect, parallel, folder / "rounds")
    if detect.method == "warm":
        _warm(search, examples, training, recorder, keeper)
    else:
        _restarted(search, examples, training, recorder)
    return search.combined(provenance)


def _warm(
    search: _Search, examples: list[Example], training: TrainingConfig, recorder: Recorder, keeper: Keeper
) -> None:
    detect = search.detect
    per_round = detect.steps_per_round or max(1, num_steps(training, len(examples)) // detect.rounds)
    reset_adapter(search.model, detect.seed, search.parallel)
    # A checkpoint goes with the rounds that end before it; those were committed first.
    found = keeper.find(usable=lambda record: record["step"] // per_round <= search.committed())
    step = 0 if found is None else found[1]["step"]
    search.resume(step // per_round)
    if step >= per_round * detect.rounds or search.ended():
        return

    def protect(where: Any) -> GraspProjector:
        return GraspProjector(where, search.combined() if search.rounds else None)

    def on_step(step: int, state: LoopState) -> None:
        if step % per_round:
            return
        number = step // per_round
        assert state.projector is not None
        state.projector.extend(search.add_round(number, search.leading()))
        state.engine.loaded()
        search.commit(number, round_gain(state.losses, per_round))
        keeper.save(step, state.engine, state.projector, state.extra())
        recorder.event(search.describe(number))
        state.ended = search.ended()

    train(
        search.model,
        examples,
        training,
        search.parallel,
        seed=detect.seed,
        steps=per_round * detect.rounds,
        recorder=recorder,
        protect=protect,
        keeper=keeper,
        usable=lambda record: record["step"] == step,
        on_step=on_step,
    )


def _restarted(search: _Search, examples: list[Example], training: TrainingConfig, recorder: Recorder) -> None:
    detect = search.detect
    steps = detect.steps_per_round or 60
    done = search.resume(search.parallel.broadcast_object(search.committed() if search.parallel.is_main else None))
    recorder.skip(done * detect.probe_seeds * steps)
    for number in range(done + 1, detect.rounds + 1):
        if search.ended():
            return
        blocked = search.combined() if search.rounds else None
        found: list[SpuriousBasis] = []
        gains: list[float] = []
        for probe in range(detect.probe_seeds):
            seed = detect.seed + (number - 1) * detect.probe_seeds + probe
            reset_adapter(search.model, seed, search.parallel)

            def protect(where: Any, blocked: SpuriousBasis | None = blocked) -> GraspProjector | None:
                return None if blocked is None else GraspProjector(where, blocked)

            def on_end(_: LoopState, found: list[SpuriousBasis] = found) -> None:
                found += search.leading()

            result = train(
                search.model,
                examples,
                training,
                search.parallel,
                seed=seed,
                steps=steps,
                recorder=recorder,
                protect=protect,
                on_end=on_end,
            )
            gains.append(round_gain(result.losses, steps))
        search.add_round(number, found)
        search.commit(number, sum(gains) / len(gains))
        recorder.event(search.describe(number))


class _Search:
    """What was found so far: one small basis per round, in the rounds' folders and open for reading."""

    def __init__(self, model: nn.Module, detect: DetectConfig, parallel: Parallel, folder: Path) -> None:
        self.model, self.detect, self.parallel, self.folder = model, detect, parallel, folder
        self.rounds: list[SpuriousBasis] = []
        self.gains: list[float] = []

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number:03d}"

    def committed(self) -> int:
        """How many rounds, from the first on, were finished. Looks at the files."""
        done = 0
        while done < self.detect.rounds and (self.round_folder(done + 1) / _COMMITTED).exists():
            done += 1
        return done

    def resume(self, done: int) -> int:
        """Open the first `done` rounds, and remove what lies behind them, to be made again; collective."""
        if self.parallel.is_main:
            for number in range(done + 1, self.detect.rounds + 1):
                shutil.rmtree(self.round_folder(number), ignore_errors=True)
        self.parallel.barrier()
        self.rounds = [SpuriousBasis.load(self.round_folder(number) / _NEW) for number in range(1, done + 1)]
        self.gains = [
            json.loads((self.round_folder(number) / _COMMITTED).read_text())["gain"] for number in range(1, done + 1)
        ]
        return done

    def leading(self) -> list[SpuriousBasis]:
        """The leading directions of the adapter's present update, on rank 0; collective."""
        found = leading_directions(
            self.model, side=self.detect.side, count=self.detect.directions_per_round, keep=self.parallel.is_main
        )
        return [] if found is None else [found]

    def add_round(self, number: int, found: list[SpuriousBasis]) -> SpuriousBasis:
        """Write what rank 0 has found with each of the round's probes, and open it on every rank."""
        path = self.round_folder(number) / _NEW

        def write() -> None:
            new = found[0] if len(found) == 1 else agreed_directions(found, count=self.detect.directions_per_round)
            new.save(path)

        self._on_main(write)
        self.rounds.append(SpuriousBasis.load(path))
        return self.rounds[-1]

    def commit(self, number: int, gain: float) -> None:
        """Make the round one that can be continued from."""
        self.gains.append(gain)
        record = {"round": number, "gain": self.gains[-1]}
        self._on_main(lambda: write_json(self.round_folder(number) / _COMMITTED, record))

    def ended(self) -> bool:
        """Whether the rounds so far leave nothing to find, by `stop_gain`, or since the last one's probes agreed on
        nothing; the same on every rank."""
        return bool(self.rounds and not len(self.rounds[-1])) or nothing_left(self.gains, self.detect.stop_gain)

    def describe(self, number: int) -> str:
        return (
            f"round {number} of {self.detect.rounds}: {len(self.rounds[-1])} weights gained directions; the loss came "
            f"{self.gains[-1]:.3f} below the base's" + (", the last round" if self.ended() else "")
        )

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
        found.provenance = {
            "method": "deflation",
            **(provenance or {}),
            "leading_share": self._concentration(),
            "gains": self.gains,
        }
        return found

    def _concentration(self) -> dict[str, float]:
        """How concentrated each weight's updates were: mean over rounds of the new directions' share of the energy."""
        found: dict[str, list[float]] = {}
        for basis in self.rounds:
            for weight, share in basis.provenance["leading_share"].items():
                found.setdefault(weight, []).append(share)
        return {weight: sum(shares) / len(shares) for weight, shares in found.items()}


def round_gain(losses: Sequence[float], steps: int) -> float:
    """How far a round of the last `steps` of these losses brought them below the base's: the mean over its last quarter
    against the first step, which no update precedes. Steps that were left out (NaN) do not count; a round without any
    other gains nothing."""
    before = next((loss for loss in losses if math.isfinite(loss)), 0.0)
    last = [loss for loss in losses[-max(1, steps // 4) :] if math.isfinite(loss)] or [before]
    return before - sum(last) / len(last)


def nothing_left(gains: Sequence[float], stop_gain: float | None) -> bool:
    """The stopping rule: whether the last two rounds' gains are below that share of the largest round's; ours. Not
    before the fourth round, and never where nothing was gained. gains: by round, how far the loss came below the
    base's."""
    if stop_gain is None or len(gains) < _EARLIEST or max(gains) <= 0:
        return False
    return max(gains[-2:]) < stop_gain * max(gains)


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
    return whole_tensor(factor).cpu()
