"""One projection pass against plain DTensor arithmetic, gather-then-project, and the floor, on 2 gloo ranks.

    python benchmarks/projector.py            # about a minute

The floor is a bare loop of the same `mm` and `addmm_` on local tensors around one flat all-reduce. All contestants take
turns in the same processes. Bars: 20 x DTensor arithmetic on (a), 5 x gather-then-project on (b), 1.15 x the floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
from harness import interleaved, machine, run_ranks, table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection import GraspProjector

CASES = {"a": (64, 256, 8), "b": (8, 2048, 16)}
SIDES = ("write", "both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print(machine() + "\n")
    rows = []
    for case, (count, size, k) in CASES.items():
        for side in SIDES:
            ms = run_ranks(measure, arguments.world, count, size, k, side, arguments.rounds)
            ours = ms["grasp"]
            rows.append(
                [f"({case}) {count} x ({size} x {size}), k = {k}, {side}"]
                + [f"{ms[name]:.2f}" for name in ("grasp", "floor", "dtensor", "gather")]
                + [f"{ours / ms['floor']:.2f}", f"{ms['dtensor'] / ours:.1f}", f"{ms['gather'] / ours:.1f}"]
            )
    print(
        table(
            [
                "case",
                "GRASP ms",
                "floor ms",
                "DTensor ms",
                "gather ms",
                "GRASP / floor",
                "DTensor / GRASP",
                "gather / GRASP",
            ],
            rows,
        )
    )


def measure(count: int, size: int, k: int, side: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of a gradient pass by contestant; every gradient is Shard(0)."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count)))
    U = [torch.linalg.qr(torch.randn(size, k))[0] for _ in range(count)]
    V = [torch.linalg.qr(torch.randn(size, k))[0] for _ in range(count)]
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        layer.weight.grad = distribute_tensor(torch.randn(size, size), mesh, [Shard(0)])
    names = [f"{index}.weight" for index in range(count)]
    tensors = {f"{name}.write": columns for name, columns in zip(names, U, strict=True)}
    if side == "both":
        tensors |= {f"{name}.read": columns for name, columns in zip(names, V, strict=True)}
    projector = GraspProjector(model, SpuriousBasis.from_tensors(tensors))
    gradients = [layer.weight.grad for layer in model]
    reads = V if side == "both" else [None] * count
    contestants: dict[str, Callable[[], None]] = {
        "grasp": projector.project_gradients,
        "floor": _floor([gradient.to_local() for gradient in gradients], U, reads),
        "dtensor": _dtensor(gradients, [distribute_tensor(u, mesh, [Shard(0)]) for u in U], reads, mesh),
        "gather": _gather(gradients, U, reads),
    }
    with torch.no_grad():
        return interleaved(contestants, rounds=rounds)


def _floor(gradients: list[Tensor], U: list[Tensor], V: list[Tensor | None]) -> Callable[[], None]:
    """The same products and one all-reduce, and nothing else: no hooks, no plan, no DTensor."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    k = U[0].shape[1]
    columns = gradients[0].shape[1]
    flat = torch.empty(len(U) * k * columns)
    C = [piece.view(k, columns) for piece in flat.split(k * columns)]
    U = [u.chunk(world_size)[rank].contiguous() for u in U]
    D_T = [torch.empty(k, gradient.shape[0]) for gradient in gradients]
    E = torch.empty(k, k)

    def run() -> None:
        for gradient, u, v, c, d_T in zip(gradients, U, V, C, D_T, strict=True):
            torch.mm(u.T, gradient, out=c)
            if v is not None:
                torch.mm(v.T, gradient.T, out=d_T)
        dist.all_reduce(flat)
        for gradient, u, v, c, d_T in zip(gradients, U, V, C, D_T, strict=True):
            if v is not None:
                torch.mm(c, v, out=E)
                c.addmm_(E, v.T, alpha=-1)
                gradient.addmm_(d_T.T, v.T, alpha=-1)
            gradient.addmm_(u, c, alpha=-1)

    return run


def _dtensor(gradients: list, U: list, V: list[Tensor | None], mesh) -> Callable[[], None]:
    """G -= U (U^T G), as one would write it."""
    from torch.distributed.tensor import Replicate

    reads = [None if v is None else distribute_tensor(v, mesh, [Replicate()]) for v in V]

    def run() -> None:
        for gradient, u, v in zip(gradients, U, reads, strict=True):
            gradient.sub_(u @ (u.T @ gradient))
            if v is not None:
                gradient.sub_((gradient @ v) @ v.T)

    return run


def _gather(gradients: list, U: list[Tensor], V: list[Tensor | None]) -> Callable[[], None]:
    """Gather the whole gradient on every rank, project it there, keep the own rows."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def run() -> None:
        for gradient, u, v in zip(gradients, U, V, strict=True):
            whole = gradient.full_tensor()
            whole.addmm_(u, u.T @ whole, alpha=-1)
            if v is not None:
                whole.addmm_(whole @ v, v.T, alpha=-1)
            gradient.to_local().copy_(whole.chunk(world_size)[rank])

    return run


if __name__ == "__main__":
    main()
