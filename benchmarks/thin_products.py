"""U^T G of a thin U and one matrix on the CPU: whole, and as a sum over slabs of rows (`grasp_dist.projection.work`).

Prints a markdown table of milliseconds, the median of nine turns in which every way is taken once.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

CASES = (
    (512, 512, 16),
    (512, 1024, 16),
    (1024, 2048, 16),
    (1024, 2048, 64),
    (4096, 4096, 8),
    (4096, 11008, 8),
    (32000, 512, 8),
)
"""Rows, columns, directions."""
HEIGHTS = (16, 32, 64)
TURNS = 9


def main() -> None:
    torch.set_num_threads(1)
    print("| G | k | whole | " + " | ".join(map(str, HEIGHTS)) + " |\n" + "| --- " * (3 + len(HEIGHTS)) + "|")
    for rows, columns, k in CASES:
        basis = torch.linalg.qr(torch.randn(rows, k))[0].contiguous()
        matrices = [torch.randn(rows, columns) for _ in range(max(2, min(16, 2**23 // (rows * columns))))]
        times: dict[int, list[float]] = {height: [] for height in (rows, *HEIGHTS)}
        for _ in range(TURNS):
            for height, found in times.items():
                started = time.perf_counter()
                for matrix in matrices:
                    _product(basis, matrix, height)
                found.append((time.perf_counter() - started) / len(matrices) * 1e3)
        medians = " | ".join(f"{statistics.median(found):.2f}" for found in times.values())
        print(f"| {rows} x {columns} | {k} | {medians} |", flush=True)


def _product(basis: Tensor, matrix: Tensor, height: int) -> Tensor:
    if height >= len(matrix):
        return basis.mT @ matrix
    total = torch.zeros(basis.shape[1], matrix.shape[1])
    for slab, part in zip(basis.split(height), matrix.split(height), strict=True):
        total.addmm_(slab.mT, part)
    return total


if __name__ == "__main__":
    main()
