"""How much of the weight change lies in the protected subspace, by optimizer: nothing, gradients only, and pinned.

    python benchmarks/optimizers.py                 # about a minute on one core
    python benchmarks/optimizers.py --deepspeed     # and DeepSpeed's CPU Adam, whose kernel is compiled at first use

A two-layer network learns a teacher that differs from its start in every direction, protected ones included, from noisy
targets. The share is |inside| / |change| over both weights, in Frobenius norms; a change in random directions has 0.32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from harness import machine, table
from torch import Tensor, nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection import GraspProjector
from grasp_dist.projection.reference import project_gradient

SIZES = (64, 96, 64)
NUM_DIRECTIONS = 4
BATCH_SIZE = 32
DECAY_PER_STEP = 1e-4
"""lr * weight_decay, the same for all; AdamW's usual 1e-3 * 0.1."""
SETTINGS: dict[str, dict[str, bool] | None] = {"none": None, "gradient": {"pin": False}, "pinned": {}}

Parameters = Iterable[nn.Parameter]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--lora", type=int, default=4, metavar="RANK", help="of the adapters of the second table")
    parser.add_argument("--deepspeed", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # torchao compiles its step, which takes longer than the benchmark
    print(machine())
    for title, rank in (("full fine-tuning", 0), (f"LoRA, rank {arguments.lora}", arguments.lora)):
        rows = []
        for name, (package, make) in OPTIMIZERS.items():
            if package == "deepspeed" and not arguments.deepspeed:
                continue
            if find_spec(package) is None:
                rows.append([name, "not installed", "", "", ""])
                continue
            rows.append([name, *measure(make, rank, arguments.steps, arguments.seeds)])
        header = ["optimizer", "no projection", "gradients only", "gradients and pins", "residual"]
        print(f"\n{title}, {arguments.steps} steps, {arguments.seeds} seeds (mean and range)\n\n{table(header, rows)}")


def measure(make: Callable[[Parameters], Any], rank: int, steps: int, seeds: int) -> list[str]:
    """A row: the share by setting, and the largest residual of the pinned runs."""
    shares: dict[str, list[float]] = {name: [] for name in SETTINGS}
    residuals = []
    for seed in range(seeds):
        for name, settings in SETTINGS.items():
            share, residual = train(make, settings, rank, steps, seed)
            shares[name].append(share)
            if name == "pinned":
                residuals.append(residual)
    return [*(_spread(values) for values in shares.values()), f"{max(residuals):.0e}"]


def train(
    make: Callable[[Parameters], Any], settings: dict[str, bool] | None, rank: int, steps: int, seed: int
) -> tuple[float, float]:
    """(share, residual) after `steps` steps."""
    torch.manual_seed(seed)
    model, teacher = _network(), _network()
    bases = {
        f"{index}.weight": tuple(torch.linalg.qr(torch.randn(dim, NUM_DIRECTIONS))[0] for dim in weight.shape)
        for index, weight in ((index, model[index].weight) for index in (0, 2))
    }
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            weight.mul_(0.3).add_(start[name])
    if rank:
        model = _adapted(model, rank)
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    projector = None
    if settings is not None:
        tensors = {}
        for name, (write, read) in bases.items():
            tensors |= {f"{name}.write": write, f"{name}.read": read}
        projector = GraspProjector(model, SpuriousBasis.from_tensors(tensors), **settings)
        projector.attach(optimizer)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        inputs = torch.randn(BATCH_SIZE, SIZES[0])
        with torch.no_grad():
            targets = teacher(inputs) + 0.1 * torch.randn(BATCH_SIZE, SIZES[-1])
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # the weights that are evaluated and saved
    residual = max(projector.residual().values()) if projector is not None else 0.0
    return _share(_change(model, start, rank), bases), residual


def _network() -> nn.Sequential:
    inner, hidden, outer = SIZES
    return nn.Sequential(nn.Linear(inner, hidden, bias=False), nn.Tanh(), nn.Linear(hidden, outer, bias=False))


def _adapted(model: nn.Sequential, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"]))


@torch.no_grad()
def _change(model: Any, start: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    if not rank:
        return {name: weight - start[name] for name, weight in model.named_parameters()}
    layers = model.base_model.model
    return {f"{index}.weight": layers[index].get_delta_weight("default") for index in (0, 2)}


def _share(change: dict[str, Tensor], bases: dict[str, tuple[Tensor, ...]]) -> float:
    inside = whole = 0.0
    for name, delta in change.items():
        write, read = (basis.double() for basis in bases[name])
        inside += (delta.double() - project_gradient(delta.double(), write, read)).square().sum().item()
        whole += delta.double().square().sum().item()
    return (inside / whole) ** 0.5


def _spread(values: list[float]) -> str:
    low, mean, high = min(values), statistics.mean(values), max(values)
    if high < 1e-3:
        return f"{mean:.0e}"
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


# -- optimizers: name -> (package, how it is made)


def _rates(lr: float) -> dict[str, float]:
    return {"lr": lr, "weight_decay": DECAY_PER_STEP / lr}


def _adamw(**settings: Any) -> Callable[[Parameters], Any]:
    return lambda parameters: torch.optim.AdamW(parameters, **_rates(1e-3), **settings)


def _transformers_adafactor(parameters: Parameters) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, **_rates(1e-3), relative_step=False, scale_parameter=False)


def _bitsandbytes(kind: str, lr: float) -> Callable[[Parameters], Any]:
    def make(parameters: Parameters) -> Any:
        import bitsandbytes

        return getattr(bitsandbytes.optim, kind)(parameters, **_rates(lr))

    return make


def _torchao(parameters: Parameters) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, **_rates(1e-3))


def _schedule_free(parameters: Parameters) -> Any:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(parameters, **_rates(1e-3))


def _deepspeed(parameters: Parameters) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, **_rates(1e-3))


OPTIMIZERS: dict[str, tuple[str, Callable[[Parameters], Any]]] = {
    "SGD, momentum 0.9": (
        "torch",
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=DECAY_PER_STEP / 5),
    ),
    "AdamW, for-loop": ("torch", _adamw(foreach=False)),
    "AdamW, foreach": ("torch", _adamw(foreach=True)),
    "AdamW, fused": ("torch", _adamw(fused=True)),
    "Adafactor (torch)": (
        "torch",
        lambda parameters: torch.optim.Adafactor(parameters, **_rates(1e-2)),
    ),
    "Adafactor (transformers)": ("transformers", _transformers_adafactor),
    "Muon (torch)": ("torch", lambda parameters: torch.optim.Muon(parameters, **_rates(1e-2))),
    "Lion (bitsandbytes)": ("bitsandbytes", _bitsandbytes("Lion", 3e-4)),
    "AdamW, 8 bit (bitsandbytes)": ("bitsandbytes", _bitsandbytes("AdamW8bit", 1e-3)),
    "AdamW, 8 bit (torchao)": ("torchao", _torchao),
    "AdamW, schedule-free": ("schedulefree", _schedule_free),
    "AdamW (deepspeed.ops.adam.DeepSpeedCPUAdam)": ("deepspeed", _deepspeed),
}


if __name__ == "__main__":
    main()
