"""One projection pass against plain DTensor arithmetic, one all-reduce per weight, gather-then-project, and the floor.

    python benchmarks/projector.py                    # every case on 1, 2 and 4 gloo ranks: about ten minutes
    python benchmarks/projector.py --cases a b --worlds 2

The floor is a bare loop of the same `mm` and `addmm_` on local tensors around one flat all-reduce: no hooks, no plan,
no check for NaN. All contestants take turns in the same processes; that is repeated in fresh processes, whose memory
lies elsewhere, and the median of the ratios is shown with the least and the largest. Bytes are counted from the
collectives that run, and memory from the storages that operators allocate. Bars on 2 ranks: (a) 20 x DTensor
arithmetic; (b) 5 x gather-then-project; 1.15 x the floor for blocks, 1.3 x for cut rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import interleaved, machine, run_ranks, table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection import GraspProjector, projector
from grasp_dist.projection.adapters import torch_optimizers
from grasp_dist.projection.adapters.flat import Run
from grasp_dist.projection.fragments import Interval, Storage, stack_shape
from grasp_dist.projection.work import FUSED_FROM, SLABS_FROM, slabs

LLAMA = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""(out, in) of one Llama-7B layer."""
CASES: dict[str, tuple[str, list[tuple[int, int]], int]] = {
    "a": ("64 x (256 x 256), k = 8", [(256, 256)] * 64, 8),
    "b": ("8 x (2048 x 2048), k = 16", [(2048, 2048)] * 8, 16),
    "c": ("flat, cut rows: 24 x (509 x 1021), k = 16", [(509, 1021)] * 24, 16),
    "d-lora": (
        "Llama-7B, 8 layers, LoRA r = 32, k = 8",
        [shape for out, into in LLAMA * 8 for shape in ((32, into), (out, 32))],
        8,
    ),
    "d-full": ("Llama-7B, 1 layer, full, k = 8", LLAMA, 8),
}
SIDES = ("write", "both")
NAMES = ("grasp", "floor", "dtensor", "per weight", "gather")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.partition("\n\n")[2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="fresh groups of processes for each case")
    parser.add_argument("--picture", type=Path, help="draw the ratios to this file")
    arguments = parser.parse_args()
    header = (
        ["case", "ranks"]
        + [f"{name} ms" for name in NAMES]
        + ["GRASP / floor", "DTensor / GRASP", "per weight / GRASP", "gather / GRASP"]
        + ["MB on the wire, GRASP / gather", "MB allocated in a pass, GRASP / gather", "MB of basis and sketches"]
    )
    print(machine() + "\n")
    print(table(header, []), flush=True)
    drawn = []
    for case in arguments.cases:
        for world in arguments.worlds:
            for side in SIDES:
                rounds = arguments.rounds if case != "d-full" else 6
                runs = [run_ranks(measure, world, case, side, rounds) for _ in range(arguments.repeats)]
                found, every = runs[0], [run["ms"] for run in runs]
                wire, memory = found["wire"], found["memory"]
                ms = {name: statistics.median(one[name] for one in every) for name in every[0]}
                drawn.append((case, world, side, ms))
                row = [f"({case}) {CASES[case][0]}, {side}", str(world)]
                row += [f"{ms[name]:.2f}" if name in ms else "-" for name in NAMES]
                row += [_ratio(every, "grasp", "floor", 2)]
                row += [_ratio(every, name, "grasp", 1) for name in ("dtensor", "per weight", "gather")]
                row += [f"{wire['grasp'] / 1e6:.2f} / {wire['gather'] / 1e6:.1f}"]
                row += [f"{memory['grasp'] / 1e6:.2f} / {memory['gather'] / 1e6:.1f}", f"{found['basis'] / 1e6:.1f}"]
                print("| " + " | ".join(row) + " |", flush=True)
    if arguments.picture:
        _draw(drawn, arguments.picture)


def _ratio(runs: list[dict[str, float]], above: str, below: str, digits: int) -> str:
    """The median of the runs' ratios, and the least and the largest."""
    ratios = sorted(ms[above] / ms[below] for ms in runs if above in ms)
    if not ratios:
        return "-"
    spread = f" ({ratios[0]:.{digits}f}-{ratios[-1]:.{digits}f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.{digits}f}{spread}"


def measure(case: str, side: str, rounds: int) -> dict[str, Any]:
    """Median milliseconds of a gradient pass by contestant, bytes on the wire, and peak memory of a pass, on rank 0."""
    _, shapes, k = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(into, out, bias=False) for out, into in shapes))
    # LoRA factors have one side each: the read side of A, the write side of B.
    factors = case == "d-lora"
    U = [None if factors and index % 2 == 0 else _columns(out, k) for index, (out, _) in enumerate(shapes)]
    V = [
        _columns(into, k) if side == "both" and not (factors and i % 2) else None for i, (_, into) in enumerate(shapes)
    ]
    tensors = {f"{index}.weight.write": u for index, u in enumerate(U) if u is not None}
    tensors |= {f"{index}.weight.read": v for index, v in enumerate(V) if v is not None}
    build = _flat_contestants if case == "c" else _block_contestants
    contestants, extra = build(model, SpuriousBasis.from_tensors(tensors), U, V)
    found: dict[str, Any] = {"wire": {}, "memory": {}, "basis": extra}
    with torch.no_grad():
        for name, run in contestants.items():
            run()
            with Meter() as meter:
                run()
            found["wire"][name], found["memory"][name] = meter.wire, meter.peak
        found["ms"] = interleaved(contestants, rounds=rounds)
    return found


def _columns(dim: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, k))[0]


class Meter(TorchDispatchMode):
    """Bytes handed to collectives (of a gather or scatter, the whole tensor's), and the peak of allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.wire = self.peak = self._live = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not set(types) <= {Tensor, nn.Parameter}:
            return NotImplemented  # a DTensor's own handler runs, and comes back here with local tensors
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) in (Tensor, nn.Parameter)]
        made = [leaf for leaf in tree_leaves(result) if type(leaf) is Tensor]
        if "c10d" in func.namespace and "wait" not in func.__name__:
            self.wire += max(leaf.numel() * leaf.element_size() for leaf in given + made)
        known = {leaf.untyped_storage().data_ptr() for leaf in given}
        for leaf in made:
            storage = leaf.untyped_storage()
            if storage.data_ptr() not in known:
                self._live += storage.nbytes()
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, numbers: int) -> None:
        self._live -= numbers


# -- blocks: every gradient is Shard(0)


def _block_contestants(model: nn.Sequential, basis: SpuriousBasis, U: list, V: list) -> tuple[dict, int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        shape = layer.weight.shape
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        layer.weight.grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
    grasp = GraspProjector(model, basis)
    gradients = [layer.weight.grad for layer in model]
    protected = [index for index in range(len(U)) if U[index] is not None or V[index] is not None]
    gradients, U, V = ([values[index] for index in protected] for values in (gradients, U, V))
    rows = [(0, gradient.shape[0]) for gradient in gradients]
    local = [gradient.to_local() for gradient in gradients]
    for index, (gradient, piece) in enumerate(zip(gradients, local, strict=True)):
        size = -(-gradient.shape[0] // dist.get_world_size())
        start = min(size * dist.get_rank(), gradient.shape[0])
        rows[index] = start, start + piece.shape[0]
    widths = [piece.shape[1] for piece in local]
    pieces = [(piece, *span, 0, piece.shape[1]) for piece, span in zip(local, rows, strict=True)]
    contestants: dict[str, Callable[[], Any]] = {
        "grasp": grasp.project_gradients,
        "floor": _floor([[piece] for piece in pieces], widths, U, V, flat=True),
        "dtensor": _dtensor(gradients, U, V, mesh),
        "per weight": _floor([[piece] for piece in pieces], widths, U, V, flat=False),
        "gather": _gather(gradients, U, V),
    }
    return contestants, _held(grasp)


def _held(grasp: GraspProjector) -> int:
    """Bytes of basis rows, pins and sketch buffers."""
    tensors = [
        t for entry in grasp._plan.entries for part in entry.parts for t in (part.left, part.right) if t is not None
    ]
    tensors += [*grasp._runtime.flats, *grasp._pins.flats]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


Piece = tuple[Tensor, int, int, int, int]
"""A 2-D local tensor, and which rows and columns of its matrix it holds."""


def _floor(matrices: list[list[Piece]], widths: list[int], U: list, V: list, *, flat: bool) -> Callable[[], None]:
    """The same products and sums and nothing else. flat False: an all-reduce for every matrix."""
    k = next(side.shape[1] for side in (*U, *V) if side is not None)
    lengths = [0 if u is None else k * width for u, width in zip(U, widths, strict=True)]
    buffer = torch.zeros(sum(lengths))
    C = [piece.view(k, -1) if piece.numel() else None for piece in buffer.split(lengths)]
    plans = []
    for pieces, u, v, c in zip(matrices, U, V, C, strict=True):
        steps = []
        for matrix, top, bottom, left, right in pieces:
            own_u = None if u is None else u[top:bottom].contiguous()
            own_v = None if v is None else v[left:right].contiguous()
            d = None if v is None else torch.empty(bottom - top, k)
            fused = u is not None and v is not None and matrix.numel() >= FUSED_FROM
            both = (torch.empty(bottom - top, 2 * k), torch.empty(2 * k, right - left)) if fused else None
            steps.append((matrix, own_u, own_v, None if c is None else c[:, left:right], d, both))
        plans.append((steps, c, v, torch.empty(k, k)))

    several = any(len(steps) > 1 for steps, *_ in plans)

    def sketch(steps: list) -> None:
        for matrix, u, v, c, d, _ in steps:
            if u is not None and matrix.numel() >= SLABS_FROM:
                if not several:
                    c.zero_()
                for rows in slabs(*matrix.shape):
                    c.addmm_(u[rows].T, matrix[rows])
            elif u is not None and several:
                c.addmm_(u.T, matrix)
            elif u is not None:
                torch.mm(u.T, matrix, out=c)
            if v is not None:
                torch.mm(matrix, v, out=d)

    def apply(steps: list, c: Tensor | None, v: Tensor | None, E: Tensor) -> None:
        if c is not None and v is not None:
            torch.mm(c, v, out=E)
            c.addmm_(E, v.T, alpha=-1)
        for matrix, u, own_v, own_c, d, both in steps:
            if both is not None:
                tall, wide = both
                torch.cat((u, d), 1, out=tall)
                torch.cat((own_c, own_v.T), 0, out=wide)
                matrix.addmm_(tall, wide, alpha=-1)
                continue
            if own_v is not None:
                matrix.addmm_(d, own_v.T, alpha=-1)
            if u is not None:
                matrix.addmm_(u, own_c, alpha=-1)

    def run() -> None:
        if several:
            buffer.zero_()
        for steps, c, v, E in plans:
            sketch(steps)
            if not flat:
                if c is not None:
                    dist.all_reduce(c)
                apply(steps, c, v, E)
        if flat:
            dist.all_reduce(buffer)
            for steps, c, v, E in plans:
                apply(steps, c, v, E)

    return run


def _dtensor(gradients: list, U: list, V: list, mesh: Any) -> Callable[[], None]:
    """G -= U (U^T G), as one would write it."""
    writes = [None if u is None else distribute_tensor(u, mesh, [Shard(0)]) for u in U]
    reads = [None if v is None else distribute_tensor(v, mesh, [Replicate()]) for v in V]

    def run() -> None:
        for gradient, u, v in zip(gradients, writes, reads, strict=True):
            if u is not None:
                gradient.sub_(u @ (u.T @ gradient))
            if v is not None:
                gradient.sub_((gradient @ v) @ v.T)

    return run


def _gather(gradients: list, U: list, V: list) -> Callable[[], None]:
    """Gather the whole gradient on every rank, project it there, keep the own rows."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def run() -> None:
        for gradient, u, v in zip(gradients, U, V, strict=True):
            whole = gradient.full_tensor()
            _project_whole(whole, u, v)
            gradient.to_local().copy_(whole.chunk(world_size)[rank])

    return run


def _project_whole(whole: Tensor, u: Tensor | None, v: Tensor | None) -> None:
    if u is not None:
        whole.addmm_(u, u.T @ whole, alpha=-1)
    if v is not None:
        whole.addmm_(whole @ v, v.T, alpha=-1)


# -- flat partitions, as in ZeRO-3: every gradient is cut evenly, rows and all


class _Flat:
    """Each parameter cut flat into equal parts."""

    owned = staticmethod(torch_optimizers.owned)
    hook = staticmethod(torch_optimizers.hook)
    beside = staticmethod(torch_optimizers.beside)
    handles_overflow = staticmethod(torch_optimizers.handles_overflow)

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.runs, self.gradients = {}, {}
        for parameter in model.parameters():
            size = -(-parameter.numel() // dist.get_world_size())
            run = Run(tuple(parameter.shape), 0, size, dist.get_rank(), dist.get_world_size())
            self.runs[id(parameter)] = run
            self.gradients[id(parameter)] = run.piece(torch.randn(parameter.shape)).clone()

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def fragment(self, name: str, parameter: nn.Parameter) -> Interval:
        run = self.runs[id(parameter)]
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        storage = Storage(lambda: run.piece(parameter), lambda: self.gradients[id(parameter)], run.piece)
        return Interval(stack_shape(run.shape), run.span, run.cuts, group, group, storage)


def _flat_contestants(model: nn.Sequential, basis: SpuriousBasis, U: list, V: list) -> tuple[dict, int]:
    framework = _Flat(model)
    projector.recognise = lambda model: framework
    grasp = GraspProjector(model, basis)
    gradients = [framework.gradients[id(layer.weight)] for layer in model]
    runs = [framework.runs[id(layer.weight)] for layer in model]
    matrices, widths = [], [layer.weight.shape[1] for layer in model]
    for gradient, layer in zip(gradients, model, strict=True):
        offset, pieces = 0, []
        for box in framework.fragment("", layer.weight).boxes():
            view = gradient[offset : offset + box.numel].view(box.size[1:])
            pieces.append((view, *box.rows, *box.columns))
            offset += box.numel
        matrices.append(pieces)
    contestants: dict[str, Callable[[], Any]] = {
        "grasp": grasp.project_gradients,
        "floor": _floor(matrices, widths, U, V, flat=True),
        "per weight": _floor(matrices, widths, U, V, flat=False),
        "gather": _gather_flat(gradients, runs, U, V),
    }
    return contestants, _held(grasp)


def _gather_flat(gradients: list[Tensor], runs: list[Run], U: list, V: list) -> Callable[[], None]:
    def run() -> None:
        for gradient, place, u, v in zip(gradients, runs, U, V, strict=True):
            padded = torch.zeros(place.partition)
            padded[: gradient.numel()] = gradient
            whole = torch.empty(place.partition * place.world_size)
            dist.all_gather_into_tensor(whole, padded)
            matrix = whole[: place.numel].view(place.shape)
            _project_whole(matrix, u, v)
            gradient.copy_(matrix.view(-1)[slice(*place.span)])

    return run


def _draw(drawn: list, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = sorted({case for case, *_ in drawn})
    figure, axes = pyplot.subplots(
        len(cases), 1, figsize=(8, 1.7 * len(cases) + 0.6), layout="constrained", squeeze=False
    )
    colours = dict(zip(NAMES, ("#1b6ca8", "#9aa5b1", "#c0504d", "#d9a441", "#6b4c9a"), strict=True))
    for axis, case in zip(axes[:, 0], cases, strict=True):
        group = [(world, side, ms) for name, world, side, ms in drawn if name == case]
        for index, (_, _, ms) in enumerate(group):
            for offset, name in enumerate(name for name in NAMES if name in ms):
                axis.bar(
                    index + 0.16 * (offset - 2), ms[name], 0.15, color=colours[name], label=name if not index else None
                )
        axis.set_yscale("log")
        axis.set_ylim(bottom=1)  # bars that begin at 1 ms: their lengths compare, on a logarithmic scale
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_xticks(range(len(group)), [f"{world} rank{'s' * (world > 1)}\n{side}" for world, side, _ in group])
        axis.set_title(f"({case}) {CASES[case][0]}", loc="left", fontsize=9)
        axis.set_ylabel("ms a pass")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0, 0].legend(ncols=5, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 1.6))
    figure.savefig(path, dpi=150)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - start:.0f} s in all")
