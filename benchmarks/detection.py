"""What one-shot detection costs on a rank-32 adapter with the shapes of Llama-7B, against the SVD of dense updates.

    OMP_NUM_THREADS=1 python benchmarks/detection.py            # one dense SVD of 4096 x 4096, about a minute
    OMP_NUM_THREADS=1 python benchmarks/detection.py --dense-all   # and one of 4096 x 11008, some minutes
    OMP_NUM_THREADS=1 python benchmarks/detection.py --no-dense

Prints a markdown table. The dense figure is measured on one weight of a shape and multiplied by the number of such
weights; without --dense-all the larger shape is counted as if it were 4096 x 4096, in favour of the dense side. Another
table has the shapes of Llama-70B: four layers are measured and multiplied by 20.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from grasp_dist.detection import detect_basis, low_rank_svd

HIDDEN, INNER, LAYERS = 4096, 11008, 32
SQUARE, WIDE = (HIDDEN, HIDDEN), (HIDDEN, INNER)
LARGE_LAYERS, LARGE_MEASURED = 80, 4


def modules_of(hidden: int, inner: int, key_value: int) -> dict[str, dict[str, tuple[int, int]]]:
    """(out, in) by module: those that write, and all."""
    write = {"self_attn.o_proj": (hidden, hidden), "mlp.down_proj": (hidden, inner)}
    more = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
    }
    return {"write": write, "all": write | more}


SMALL = modules_of(HIDDEN, INNER, HIDDEN)
LARGE = modules_of(8192, 28672, 1024)


def factors(shape: tuple[int, int], rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r), fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)


def factored_seconds(modules: dict[str, tuple[int, int]], rank: int, layers: int = LAYERS) -> float:
    """Seconds of `low_rank_svd` over every weight of the model: what a round of deflation computes."""
    spent = 0.0
    for seed in range(layers):
        for shape in modules.values():
            a, b = factors(shape, rank, seed)
            start = time.perf_counter()
            low_rank_svd(a, b, 2.0)
            spent += time.perf_counter() - start
    return spent


def end_to_end_seconds(modules: dict[str, tuple[int, int]], rank: int, keep: int, layers: int = LAYERS) -> float:
    """Seconds of `detect_basis` on an adapter directory and of saving what it found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for layer in range(layers):
            for module, shape in modules.items():
                a, b = factors(shape, rank, layer)
                stem = f"base_model.model.model.layers.{layer}.{module}"
                tensors |= {f"{stem}.lora_A.weight": a.bfloat16(), f"{stem}.lora_B.weight": b.bfloat16()}
        save_file(tensors, folder / "adapter_model.safetensors")
        del tensors
        start = time.perf_counter()
        detect_basis(folder, rank=keep).save(folder / "basis.safetensors")
        return time.perf_counter() - start


def dense_seconds(shape: tuple[int, int], rank: int) -> float:
    """Seconds to form one dense fp32 update and take its SVD."""
    a, b = factors(shape, rank, 0)
    start = time.perf_counter()
    torch.linalg.svd(2.0 * b @ a, full_matrices=False)
    return time.perf_counter() - start


def peak_mib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter")
    parser.add_argument("--keep", type=int, default=8, help="directions kept per weight, end to end")
    parser.add_argument("--dense-all", action="store_true", help="also time the SVD of one dense 4096 x 11008")
    parser.add_argument("--no-dense", action="store_true", help="only the factored side")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    low_rank_svd(*factors((64, 64), 4, 0))  # LAPACK's first call
    start = peak_mib()
    fast = {label: factored_seconds(modules, arguments.rank) for label, modules in SMALL.items()}
    factored_peak = peak_mib() - start
    whole = {label: end_to_end_seconds(modules, arguments.rank, arguments.keep) for label, modules in SMALL.items()}
    dense = {}
    if not arguments.no_dense:
        dense[SQUARE] = dense_seconds(SQUARE, arguments.rank)
        dense[WIDE] = dense_seconds(WIDE, arguments.rank) if arguments.dense_all else dense[SQUARE]
        how = "measured" if arguments.dense_all else "counted as 4096 x 4096"
        print(f"dense SVD, one weight: 4096 x 4096 {dense[SQUARE]:.1f} s; 4096 x 11008 {dense[WIDE]:.1f} s ({how})")
    print(
        f"memory of the factored side above the start: {factored_peak:.0f} MiB (one dense fp64 update: 128 MiB or more)"
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), rank {arguments.rank}\n")
    print("| modules | weights | factored SVD | detect_basis, read to saved file | dense SVD, extrapolated | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for label, modules in SMALL.items():
        total, ratio = "not run", ""
        if dense:
            seconds = LAYERS * sum(dense[SQUARE if shape == SQUARE else WIDE] for shape in modules.values())
            total, ratio = f"{seconds:.0f} s", f"{seconds / fast[label]:.0f}x (bar 100x)"
        print(f"| {label} | {LAYERS * len(modules)} | {fast[label]:.2f} s | {whole[label]:.2f} s | {total} | {ratio} |")
    print("\n| 70B: modules | weights | factored SVD | detect_basis, read to saved file |")
    print("| --- | --- | --- | --- |")
    times = LARGE_LAYERS // LARGE_MEASURED
    for label, modules in LARGE.items():
        once = factored_seconds(modules, arguments.rank, LARGE_MEASURED)
        through = end_to_end_seconds(modules, arguments.rank, arguments.keep, LARGE_MEASURED)
        print(
            f"| {label} | {LARGE_LAYERS * len(modules)} | {once:.2f} s x {times} = {once * times:.0f} s | "
            f"{through:.2f} s x {times} = {through * times:.0f} s |"
        )


if __name__ == "__main__":
    main()
