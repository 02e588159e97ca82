"""What GRASP adds to a training step, LoRA and full fine-tuning, side by side in one run, with its breakdown.

    python benchmarks/overhead.py                # one process, some minutes
    python benchmarks/overhead.py --world 2      # 2 gloo ranks under fully_shard

Steps with and without the projector alternate in the same process on the same model; the figure is the median of the
ratios of neighbouring steps, in wall time and in the CPU time of rank 0 (steadier on a machine that others use). A step
is everything from the forward pass to `zero_grad`, gradient clipping included.
Bars, for the default protection (write modules, write side, rank 8) on the model of some 50 M parameters: LoRA 3 %,
full fine-tuning 15 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from harness import interleaved, machine, run_ranks, table
from torch import nn
from torch.distributed.tensor import DTensor

from grasp_dist.architecture import linear_modules, logical_shape, resolve_modules
from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection import GraspProjector

MODELS: dict[str, dict[str, Any]] = {
    "50M": {
        "config": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12},
        "heads": 8,
        "batch": (2, 256),
    },
    "organism": {
        "config": {"vocab_size": 117, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3},
        "heads": 4,
        "batch": (64, 16),
    },
}
# name: (modules that train and are protected, sides)
PROTECTION = {"default": ("write", "write"), "all linear, both sides": ("all", "both")}
BASIS_RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument(
        "--pairs", type=int, default=10, help="pairs of steps on the large model; 10 x as many on the small"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--protection", nargs="+", default=list(PROTECTION), choices=list(PROTECTION))
    arguments = parser.parse_args()
    print(f"{machine()}; {arguments.world} process(es)\n")
    rows = []
    for model in arguments.models:
        pairs = arguments.pairs if model == "50M" else 10 * arguments.pairs
        for protection in arguments.protection:
            for method in ("lora", "full"):
                found = run_ranks(measure, arguments.world, model, method, protection, pairs)
                print(f"{model} {method} {protection}: {100 * found['overhead']:+.1f} %", file=sys.stderr)
                rows.append([f"{model} ({found['parameters'] / 1e6:.1f} M)", method, protection, *_cells(found)])
    header = ["model", "method", "protection", "step ms", "with GRASP", "overhead", "in CPU time"]
    header += ["gradient pass: sketch", "all-reduce", "apply", "pin pass: sketch", "all-reduce", "apply", "MB reduced"]
    print(table(header, rows))


def measure(name: str, method: str, protection: str, pairs: int) -> dict[str, Any]:
    """Milliseconds per step and per part of a pass, on rank 0; collective."""
    modules, side = PROTECTION[protection]
    model = _make_model(name, method, modules)
    basis = _make_basis(model, modules, side)
    if dist.get_world_size() > 1:
        _shard(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.1, fused=True)
    projector = GraspProjector(model, basis)
    steps = _alternate(model, trainable, optimizer, projector, tuple(MODELS[name]["batch"]), pairs)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": projector.bytes_per_pass,
        **steps,
        **_breakdown(projector),
    }


def _alternate(
    model: nn.Module,
    trainable: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    projector: GraspProjector,
    batch: tuple[int, int],
    pairs: int,
) -> dict[str, float]:
    tokens = torch.randint(model.config.vocab_size, batch)  # type: ignore[union-attr,arg-type]

    def step(protected: bool) -> tuple[float, float]:
        if protected:
            projector.attach(optimizer)
        if dist.get_world_size() > 1:
            dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if protected:
            projector.project_gradients()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken = time.perf_counter() - start, time.process_time() - start_cpu
        projector.detach()
        return taken

    for protected in (False, True):
        step(protected)
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for index in range(pairs):
        for protected in (False, True) if index % 2 else (True, False):
            times[protected].append(step(protected))
    bare, guarded = ([wall for wall, _ in times[protected]] for protected in (False, True))
    ratios = [
        [with_it[clock] / without[clock] for without, with_it in zip(times[False], times[True], strict=True)]
        for clock in (0, 1)
    ]
    return {
        "bare": statistics.median(bare) * 1e3,
        "guarded": statistics.median(guarded) * 1e3,
        "overhead": statistics.median(ratios[0]) - 1,
        "overhead_cpu": statistics.median(ratios[1]) - 1,
    }


def _breakdown(projector: GraspProjector) -> dict[str, float]:
    """The parts of the two passes alone, from the rooms that the projector is made of."""
    with torch.no_grad():
        plan, runtime, pins = projector._plan, projector._runtime, projector._pins.flats
        weights = [entry.fragment.storage.weight() for entry in plan.entries]
        gradients = [torch.randn_like(weight) for weight in weights]
        nothing: list[None] = [None] * len(weights)
        return interleaved(
            {
                "gradient": lambda: runtime.project(gradients),
                "gradient_sketch": lambda: runtime.sketch(gradients),
                "pin": lambda: runtime.restore(weights, pins),
                "pin_sketch": lambda: runtime.sketch(weights, pins),
                "reduce": lambda: runtime.sketch(nothing),  # zeros: the sum alone, and clearing the buffers
            },
            rounds=20,
        )


def _cells(found: dict[str, Any]) -> list[str]:
    reduce = found["reduce"] if found["bytes"] else 0.0
    cells = [f"{found['bare']:.1f}", f"{found['guarded']:.1f}", f"{100 * found['overhead']:+.1f} %"]
    cells.append(f"{100 * found['overhead_cpu']:+.1f} %")
    for part in ("gradient", "pin"):
        sketch = found[f"{part}_sketch"]
        cells += [f"{value:.2f}" for value in (sketch - reduce, reduce, found[part] - sketch)]
    return [*cells, f"{found['bytes'] / 1e6:.2f}"]


def _make_model(name: str, method: str, modules: str) -> nn.Module:
    """Full fine-tuning trains every parameter; LoRA (rank 8) the modules that are protected."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = MODELS[name]
    torch.manual_seed(0)
    heads = settings["heads"]
    model = LlamaForCausalLM(LlamaConfig(**settings["config"], num_attention_heads=heads, num_key_value_heads=heads))
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=8, target_modules=resolve_modules(model, modules)))
    return model


def _make_basis(model: nn.Module, modules: str, side: str) -> SpuriousBasis:
    linear = linear_modules(model)
    tensors = {}
    for name in resolve_modules(model, modules):
        out, into = logical_shape(linear[name])
        tensors[f"{name}.weight.write"] = torch.linalg.qr(torch.randn(out, BASIS_RANK))[0]
        if side == "both":
            tensors[f"{name}.weight.read"] = torch.linalg.qr(torch.randn(into, BASIS_RANK))[0]
    return SpuriousBasis.from_tensors(tensors)


def _shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


if __name__ == "__main__":
    main()
