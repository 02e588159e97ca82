"""How a projection pass grows: with the weights, the directions, the number of weights and the ranks.

    python benchmarks/growth.py                # both parts and growth.png: 4 to 8 minutes, 3 GB of memory
    python benchmarks/growth.py --quick        # the same on few, small cases: about a minute, no picture
    python benchmarks/growth.py --parts plans  # only one part

passes: `project_gradients` on gloo ranks, over square weights that are sharded by rows (`Shard(0)`) or flat, with every
    cut inside a row. Medians, all cases in turns: wall time, and in brackets the CPU time of rank 0's own thread, which
    is steadier where others use the machine; the picture shows the latter. Bytes and calls are counted from the
    collectives that run. Ranks beyond the machine's cores tell bytes and work, not speed.
plans: `GraspProjector(...)` for one rank (the second) of 64 to 4096, for every linear weight of a 70B Llama, both
    sides, k = 8, one thread. The process group is torch's fake one, which answers at once and sums nothing; so the
    check that needs sums, that the basis is orthonormal, runs but may not object. Layers share the memory of their
    weights; the basis is a real file. Bytes are those of the tensors that the projector keeps.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import machine, run_ranks, table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection import GraspProjector, layout, plan, projector
from grasp_dist.projection.adapters import torch_optimizers
from grasp_dist.projection.adapters.flat import Run
from grasp_dist.projection.fragments import Interval, Storage, stack_shape

Case = tuple[int, int, int]
"""(number of weights, their rows and columns, k)."""

SIZES: list[Case] = [(8, size, 8) for size in (256, 512, 1024, 2048)]
RANKS_OF_BASIS: list[Case] = [(8, 1024, k) for k in (1, 4, 8, 16, 32, 64)]
COUNTS: list[Case] = [(2, 2048, 8), (8, 1024, 8), (32, 512, 8), (128, 256, 8), (512, 128, 8)]
TINY: list[Case] = [(count, 16, 1) for count in (1, 16, 128, 1024)]
WORLDS = (1, 2, 4, 8)
WORLD_CASE: Case = (8, 1024, 8)
VARIANTS = ("rows, write", "rows, both", "flat, write", "flat, both")

LAYERS, K = 80, 8
LLAMA_70B = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
POWERS, ODD = (64, 512, 4096), (60, 500, 4000)
LAYOUTS = {
    "FSDP2, Shard(0)": POWERS,
    "HSDP, shards of 64": POWERS,
    "FSDP x TP 8": POWERS,
    "ZeRO-3": POWERS,
    "ZeRO-3, cut rows": ODD,
}
"""{layout: worlds}. ZeRO-3's partitions end between rows in the powers of two (but for k and v on 4096), and inside
rows elsewhere."""
MESHES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "FSDP2, Shard(0)": lambda ranks: (ranks,),
    "HSDP, shards of 64": lambda ranks: (ranks // 64, 64),
    "FSDP x TP 8": lambda ranks: (ranks // 8, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("passes", "plans"), default=["passes", "plans"])
    parser.add_argument("--rounds", type=int, default=15, help="measured turns of every pass")
    parser.add_argument("--quick", action="store_true", help="few and small cases, to see that it runs")
    parser.add_argument("--picture", type=Path, help="file to draw to (growth.png beside this script; --quick: none)")
    arguments = parser.parse_args()
    print(machine())
    passes, plans = None, None
    if "passes" in arguments.parts:
        passes = measure_passes(4 if arguments.quick else arguments.rounds, arguments.quick)
    if "plans" in arguments.parts:
        plans = measure_plans(4 if arguments.quick else LAYERS, arguments.quick)
    path = arguments.picture
    if path is None and passes and plans and not arguments.quick:
        path = Path(__file__).with_suffix(".png")
    if path is not None and passes and plans:
        draw(path, passes, plans)
        print(f"\ndrawn to {path}")


# -- passes: measured


def measure_passes(rounds: int, quick: bool) -> dict[str, Any]:
    """{sweep: {case or world: {variant: figures}}}; prints the tables."""
    sweeps = {"size": SIZES, "k": RANKS_OF_BASIS, "count": COUNTS, "tiny": TINY}
    if quick:
        sweeps = {name: cases[-2:] if name == "count" else cases[:2] for name, cases in sweeps.items()}
    cases = [case for found in sweeps.values() for case in found]
    on_two = run_ranks(time_cases, 2, cases, rounds)
    results: dict[str, Any] = {name: {case: on_two[case] for case in found} for name, found in sweeps.items()}
    titles = {
        "size": "By size of the weights",
        "k": "By directions",
        "count": "By number of weights, 8.4 M numbers in all",
        "tiny": "Tiny weights: the interpreter's time",
    }
    for name, found in results.items():
        print(f"\n### {titles[name]} (2 ranks)\n")
        print(_case_table(found))
    print()
    for variant in VARIANTS:
        (few, low), *_, (many, high) = ((case[0], found[variant]["cpu"]) for case, found in results["tiny"].items())
        print(f"- {variant}: {1e3 * (high - low) / (many - few):.0f} us of CPU time for each further tiny weight")
    worlds = WORLDS[:2] if quick else WORLDS
    results["world"] = {world: run_ranks(time_cases, world, [WORLD_CASE], rounds)[WORLD_CASE] for world in worlds}
    print(f"\n### By ranks: {_name(WORLD_CASE)}\n")
    header = ["ranks", "sharding, sides", "wall ms", "CPU ms of a rank", "KB reduced", "all-reduces"]
    rows = [
        [world, variant, f"{f['ms']:.2f}", f"{f['cpu']:.2f}", f"{f['bytes'] / 1e3:.1f}", f["calls"]]
        for world, found in results["world"].items()
        for variant, f in found.items()
    ]
    print(table(header, rows))
    return results


def _case_table(found: dict[Case, dict[str, dict[str, float]]]) -> str:
    header = ["weights", *(f"{v}: ms (CPU)" for v in VARIANTS), *(f"{v}: KB" for v in VARIANTS[1::2])]
    rows = [
        [
            _name(case),
            *(f"{f[v]['ms']:.2f} ({f[v]['cpu']:.2f})" for v in VARIANTS),
            *(f"{f[v]['bytes'] / 1e3:.1f}" for v in VARIANTS[1::2]),
        ]
        for case, f in found.items()
    ]
    return table(header, rows)


def _name(case: Case) -> str:
    count, size, k = case
    return f"{count} x ({size} x {size}), k = {k}"


def time_cases(cases: Sequence[Case], rounds: int) -> dict[Case, dict[str, dict[str, float]]]:
    """{case: {variant: wall and CPU milliseconds of a pass, bytes and calls of its collectives}}; collective."""
    torch.set_num_threads(1)
    passes = {(case, variant): run for case in dict.fromkeys(cases) for variant, run in _passes(*case).items()}
    results: dict[Case, dict[str, dict[str, float]]] = {case: {} for case, _ in passes}
    for (case, variant), run in passes.items():
        with _Watch() as watch:
            run()
        results[case][variant] = {"bytes": watch.bytes, "calls": watch.calls}
    for (case, variant), (wall, cpu) in _in_turns(passes, rounds).items():
        results[case][variant] |= {"ms": wall, "cpu": cpu}
    return results


def _passes(count: int, size: int, k: int) -> dict[str, Callable[[], Any]]:
    """`project_gradients` of one model each; both sides work on the same gradients as the write side."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    columns = torch.linalg.qr(torch.randn(size, k, generator=torch.Generator().manual_seed(0)))[0]
    by_rows = [torch.randn(size // world_size, size) for _ in range(count)]
    shape, offset = (size, size), size // 2 if world_size > 1 else 0
    run = Run(shape, offset, -(-(size * size + offset) // world_size), rank, world_size)
    flat = [torch.randn(run.length) for _ in range(count)]
    passes: dict[str, Callable[[], Any]] = {}
    for sharding in ("rows", "flat"):
        for side in ("write", "both"):
            model = nn.Sequential(*(nn.Linear(size, size, bias=False, device="meta") for _ in range(count)))
            tensors = {f"{i}.weight.write": columns for i in range(count)}
            if side == "both":
                tensors |= {f"{i}.weight.read": columns for i in range(count)}
            model_or_flat: Any = model
            if sharding == "rows":
                for layer, piece in zip(model, by_rows, strict=True):
                    local = DTensor.from_local(piece, mesh, [Shard(0)], run_check=False)
                    layer.weight = nn.Parameter(local)  # type: ignore[assignment]
                    layer.weight.grad = local
            else:
                pieces = {id(layer.weight): piece for layer, piece in zip(model, flat, strict=True)}
                model_or_flat = Flat(model, pieces, {shape: run})
            passes[f"{sharding}, {side}"] = _projector(
                model_or_flat, SpuriousBasis.from_tensors(tensors)
            ).project_gradients
    return passes


def _in_turns(passes: dict[Any, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[Any, tuple[float, float]]:
    """Median (wall, own thread's CPU) milliseconds of each, taken turn by turn."""
    times: dict[Any, list[tuple[float, float]]] = {name: [] for name in passes}
    for index in range(warmup + rounds):
        for name in passes if index % 2 else reversed(passes):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.thread_time()
            passes[name]()
            if index >= warmup:
                times[name].append((time.perf_counter() - wall, time.thread_time() - cpu))
    return {
        name: tuple(statistics.median(column) * 1e3 for column in zip(*found, strict=True))  # type: ignore[misc]
        for name, found in times.items()
    }


class _Watch(TorchDispatchMode):
    """Counts the collectives underneath, and the bytes that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in given)
            self.calls += 1
        return func(*args, **(kwargs or {}))


class Flat:
    """A framework whose weights are on the meta device and whose optimizer would step flat pieces of them; a piece is
    its own gradient."""

    handles_overflow = staticmethod(torch_optimizers.handles_overflow)
    beside = staticmethod(torch_optimizers.beside)

    def __init__(self, module: nn.Module, pieces: dict[int, Tensor], runs: dict[tuple[int, ...], Run]) -> None:
        """pieces: this rank's, by the parameter's id; runs: where they lie, by the parameter's shape."""
        self.module, self._pieces, self._runs = module, pieces, runs

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def fragment(self, name: str, parameter: nn.Parameter) -> Interval:
        piece, run = self._pieces[id(parameter)], self._runs[tuple(parameter.shape)]
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        storage = Storage(lambda: piece, lambda: piece, run.piece)
        return Interval(stack_shape(run.shape), run.span, run.cuts, group, group, storage)


def _projector(model: nn.Module | Flat, basis: SpuriousBasis) -> GraspProjector:
    if not isinstance(model, Flat):
        return GraspProjector(model, basis)
    recognise = projector.recognise
    projector.recognise = lambda _: model  # type: ignore[assignment, return-value]
    try:
        return GraspProjector(model, basis)
    finally:
        projector.recognise = recognise


# -- plans: one rank of many


def measure_plans(layers: int, quick: bool) -> dict[str, dict[int, dict[str, float]]]:
    """{layout: {ranks: figures}}; prints the table."""
    results: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "basis.safetensors"
        columns = {n: torch.linalg.qr(torch.randn(n, K))[0] for shape in LLAMA_70B.values() for n in shape}
        names = [(f"model.layers.{i}.{name}.weight", shape) for i in range(layers) for name, shape in LLAMA_70B.items()]
        tensors = {f"{name}.write": columns[out] for name, (out, _) in names}
        tensors |= {f"{name}.read": columns[into] for name, (_, into) in names}
        SpuriousBasis.from_tensors(tensors).save(path)
        for kind, worlds in LAYOUTS.items():
            results[kind] = {}
            for world in worlds[-1:] if quick else worlds:
                print(f"{kind}, {world} ranks", file=sys.stderr)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    results[kind][world] = pool.apply(plan_one_rank, (kind, world, layers, path))
    count = layers * len(LLAMA_70B)
    print(f"\n### Plans: {count} weights of a 70B Llama, both sides, k = {K}; one rank of many\n")
    header = ["sharding", "ranks", "CPU s to build", "the basis read", "the plan", "the weights sketched twice"]
    header += ["thousand objects", "MB basis", "MB sketches", "MB pins", "MB in all", "MB reduced a pass"]
    header += ["CPU s of a pass's arithmetic"]
    rows = []
    for kind, by_world in results.items():
        for world, f in by_world.items():
            seconds = [f"{f[part]:.2f}" for part in ("build", "read", "plan", "weights")]
            megabytes = [f"{f[part] / 1e6:.1f}" for part in ("basis", "sketches", "pins", "all", "reduced")]
            rows.append([kind, world, *seconds, f"{f['objects'] / 1e3:.0f}", *megabytes, f"{f['pass']:.2f}"])
    print(table(header, rows))
    return results


def plan_one_rank(kind: str, world_size: int, layers: int, path: Path) -> dict[str, float]:
    """Seconds, bytes and numbers of objects of one rank's projector."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=world_size)
    plan.ORTHONORMAL_TOLERANCE = math.inf
    clock: Counter[str] = Counter()
    layout.BasisRows.read = _timed(layout.BasisRows.read, "read", clock)  # type: ignore[method-assign]
    projector.build_plan = _timed(projector.build_plan, "plan", clock)
    projector.check_start = _timed(projector.check_start, "weights", clock)
    projector.Pins = _timed(projector.Pins, "weights", clock)  # type: ignore[misc, assignment]
    model = _sharded_llama(kind, layers)
    basis = SpuriousBasis.load(path)
    gc.collect()
    objects = len(gc.get_objects())
    made = _timed(_projector, "build", clock)(model, basis)
    gc.collect()
    objects = len(gc.get_objects()) - objects
    if not isinstance(model, Flat):
        for parameter in model.parameters():
            parameter.grad = parameter.detach()
    _timed(made.project_gradients, "pass", clock)()
    kept = made._plan, made._runtime, made._pins
    rows = [basis for entry in kept[0].entries for part in entry.parts for basis in (part.left, part.right)]
    small = [overlap._E for worker in kept[1]._all._workers for overlap in worker._overlaps]
    return {
        **clock,
        "plan": clock["plan"] - clock["read"],
        "objects": objects,
        "basis": _bytes(rows),
        "sketches": _bytes(kept[1].flats),
        "pins": _bytes(kept[2].flats),
        "all": _bytes([*rows, *kept[1].flats, *kept[2].flats, *small]),
        "reduced": made.bytes_per_pass,
    }


def _sharded_llama(kind: str, layers: int) -> nn.Module | Flat:
    """The linear weights of this rank; all layers share the memory of one."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", MESHES[kind](world_size)) if kind in MESHES else None
    runs: dict[tuple[int, ...], Run] = {
        shape: Run(shape, 0, -(-math.prod(shape) // world_size), rank, world_size) for shape in LLAMA_70B.values()
    }
    local: dict[str, Tensor] = {}
    for name, shape in LLAMA_70B.items():
        sizes: Sequence[int] = (runs[shape].length,)
        if mesh is not None:
            sizes, _ = compute_local_shape_and_global_offset(shape, mesh, _placements(kind, name))
        local[name] = torch.randn(sizes)
    root, pieces = nn.Module(), {}
    root.model = nn.Module()
    root.model.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        for name, (out, into) in LLAMA_70B.items():
            parent, leaf = name.split(".")
            linear = nn.Linear(into, out, bias=False, device="meta")
            if mesh is not None:
                weight = DTensor.from_local(
                    local[name], mesh, _placements(kind, name), run_check=False,
                    shape=torch.Size((out, into)), stride=(into, 1),
                )  # fmt: skip
                linear.weight = nn.Parameter(weight)
            pieces[id(linear.weight)] = local[name]
            layer.get_submodule(parent).add_module(leaf, linear)
        root.model.layers.append(layer)
    return root if mesh is not None else Flat(root, pieces, runs)


def _placements(kind: str, name: str) -> list[Any]:
    if kind.startswith("FSDP2"):
        return [Shard(0)]
    if kind.startswith("HSDP"):
        return [Replicate(), Shard(0)]
    if name in ("self_attn.o_proj", "mlp.down_proj"):
        return [Shard(0), Shard(1)]
    return [_StridedShard(0, split_factor=8), Shard(0)]


def _timed(function: Callable[..., Any], name: str, clock: Counter[str]) -> Callable[..., Any]:
    """The same, whose CPU seconds are added to the clock."""

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            clock[name] += time.process_time() - start  # type: ignore[assignment]

    return timed


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of the memory behind them, each piece counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# -- the picture

INK, MUTED, BLUE, ORANGE = "#1c1d1f", "#63666b", "#0065ab", "#c84a05"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": MUTED,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.6,
}
LINES = dict(zip(VARIANTS, [(BLUE, "--"), (BLUE, "-"), (ORANGE, "--"), (ORANGE, "-")], strict=True))
MARKS = dict(
    zip(LAYOUTS, [(BLUE, "o"), ("#007a58", "s"), ("#5c3fb0", "^"), (ORANGE, "D"), ("#a07300", "X")], strict=True)
)


def draw(path: Path, passes: dict[str, Any], plans: dict[str, dict[int, dict[str, float]]]) -> None:
    """Time by size, directions, number of weights and ranks; memory and building time by world."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        (size, k, count), (ranks, memory, building) = figure.subplots(2, 3)
        _draw_passes(size, _by(1, passes["size"]), "Size: CPU ms of a pass", "rows and columns of 8 weights, k = 8")
        _draw_passes(k, _by(2, passes["k"]), "Directions: CPU ms of a pass", "k, on 8 weights of 1024 x 1024")
        _draw_passes(
            count, _by(0, passes["count"]), "Count: CPU ms of a pass", "weights that share 8.4 M numbers, k = 8"
        )
        _draw_passes(ranks, passes["world"], "Ranks: CPU ms of each", "ranks, 8 weights of 1024 x 1024, k = 8")
        _draw_plans(memory, plans, "all", 1e6, "Llama-70B: MB kept by each rank")
        _draw_plans(building, plans, "build", 1, "Llama-70B: CPU s to build")
        size.legend(loc="upper left")
        memory.legend(loc="lower left")
        figure.savefig(path, dpi=130, facecolor="white")


def _by(place: int, found: dict[Case, Any]) -> dict[int, Any]:
    return {case[place]: figures for case, figures in found.items()}


def _draw_passes(ax: Any, points: dict[int, Any], title: str, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for variant, (colour, line) in LINES.items():
        values = [figures[variant]["cpu"] for figures in points.values()]
        ax.plot(list(points), values, line, color=colour, marker="o", markersize=3.5, label=variant)
    ax.set(xscale="log", yscale="log", title=title, xlabel=label)
    values = [figures[variant]["cpu"] for figures in points.values() for variant in LINES]
    steps = [mantissa * 10.0**power for power in range(-4, 6) for mantissa in (1, 2, 5)]
    ax.set_ylim(max(step for step in steps if step <= min(values)), min(step for step in steps if step >= max(values)))
    ax.set_xticks(list(points), [str(point) for point in points])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())


def _draw_plans(ax: Any, plans: dict[str, dict[int, dict[str, float]]], part: str, unit: float, title: str) -> None:
    from matplotlib.ticker import NullLocator

    for kind, by_world in plans.items():
        colour, marker = MARKS[kind]
        values = [figures[part] / unit for figures in by_world.values()]
        ax.plot(list(by_world), values, color=colour, marker=marker, markersize=5.5, label=kind)
    ax.set(xscale="log", title=title, xlabel=f"ranks; all linear weights, both sides, k = {K}", ylim=(0, None))
    ax.set_xticks(POWERS, [str(world) for world in POWERS])
    ax.xaxis.set_minor_locator(NullLocator())


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - start:.0f} s in all")
