"""What saving costs a training run: intervals of 50 steps with a checkpoint at their beginning and without, in turns.

    python benchmarks/checkpoints.py              # one process, some minutes
    python benchmarks/checkpoints.py --world 2    # 2 gloo ranks under fully_shard

Every other interval begins with a save (weights, moments, pins; AdamW), so that what it costs, its thread's writing
while training goes on included, is in the ratio of two neighbours. `stall`: how long the call itself kept the loop.
Bar: with saves in the background 5 % of an interval on the organism's model.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import machine, run_ranks, table

from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from grasp_dist.projection import GraspProjector
from grasp_dist.training.checkpoints.saving import Keeper
from grasp_dist.training.checkpoints.store import Checkpoints
from grasp_dist.training.examples import Example
from grasp_dist.training.loop import LoopState, train
from grasp_dist.training.model import load_model
from grasp_dist.training.parallel import init_parallel

ORGANISM = {"vocab_size": 117, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.partition("\n\n")[2])
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of intervals")
    parser.add_argument("--interval", type=int, default=50, metavar="STEPS")
    arguments = parser.parse_args()
    print(f"{machine()}; {arguments.world} process(es)\n")
    rows = []
    for method in ("lora", "full"):
        for background in (True, False):
            found = run_ranks(measure, arguments.world, method, background, arguments.pairs, arguments.interval)
            rows.append(
                [
                    method,
                    "background" if background else "at once",
                    f"{found['bytes'] / 1e6:.2f}",
                    f"{found['without']:.2f}",
                    f"{100 * found['overhead']:+.1f} % ({100 * found['least']:+.1f} to {100 * found['most']:+.1f})",
                    f"{1e3 * found['stall']:.1f}",
                    f"{100 * found['stall'] / found['without']:.2f} %",
                ]
            )
    header = ["method", "saving", "MB", "s an interval", "with a save", "stall ms", "stall of an interval"]
    print(table(header, rows))


def measure(method: str, background: bool, pairs: int, interval: int) -> dict[str, Any]:
    """Seconds of intervals and saves on rank 0; interval: steps; collective."""
    parallel = init_parallel(ParallelConfig())
    with tempfile.TemporaryDirectory() as own:
        folder = Path(parallel.broadcast_object(own))
        if parallel.is_main:
            _make_model(folder / "model")
        parallel.barrier()
        training = TrainingConfig(
            method=method, modules="write" if method == "lora" else "everything", lora=LoraConfig(rank=8, alpha=16),
            steps=interval * (2 * pairs + 2), batch_size=64,
        )  # fmt: skip
        model = load_model(
            ModelConfig(path=str(folder / "model")), parallel, precision="fp32", training=training, seed=0
        )
        keeper = _Timed(Checkpoints(folder / "checkpoints"), parallel, every=2 * interval, background=background)
        times = []

        def on_step(step: int, state: LoopState) -> None:
            if step % interval == 0:  # before a save that is due
                times.append(time.perf_counter())

        train(
            model, _examples(), training, parallel, seed=0, keeper=keeper, on_step=on_step,
            protect=lambda where: GraspProjector(where, _basis()),
        )  # fmt: skip
        sizes = [sum(file.stat().st_size for file in path.iterdir()) for _, path in keeper.checkpoints.folders()]
        intervals = [after - before for before, after in itertools.pairwise(times)]
        # Intervals 1, 3, ... begin with a save.
        with_save, without = intervals[1::2], intervals[2::2]
        ratios = [a / b - 1 for a, b in zip(with_save, without, strict=False)]
        parallel.barrier()
    return {
        "bytes": sizes[0],
        "without": statistics.median(without),
        "overhead": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "stall": statistics.median(keeper.seconds),
    }


class _Timed(Keeper):
    """Notes how long each save kept the loop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []

    def save(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super().save(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)


def _make_model(path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**ORGANISM, num_attention_heads=4, num_key_value_heads=4)).save_pretrained(path)


def _examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(117, (256, 16), generator=generator).tolist()
    return [Example(row, row) for row in rows]


def _basis() -> SpuriousBasis:
    torch.manual_seed(0)
    names = [
        f"model.layers.{layer}.{name}.weight" for layer in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    return SpuriousBasis.from_tensors({f"{name}.write": torch.linalg.qr(torch.randn(192, 8))[0] for name in names})


if __name__ == "__main__":
    main()
