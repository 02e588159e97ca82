"""benchmarks/growth.py plans for one rank of thousands, on torch's fake process group, and counts what it should."""

from __future__ import annotations

import importlib
import multiprocessing
from pathlib import Path

import pytest
import torch

from grasp_dist.basis import SpuriousBasis

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(("kind", "ranks", "cut_rows"), [("FSDP2, Shard(0)", 4096, 0), ("ZeRO-3, cut rows", 4000, 1)])
def test_plans_one_rank_of_thousands(kind, ranks, cut_rows, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    growth = importlib.import_module("growth")
    tensors = {}
    for name, (out, into) in growth.LLAMA_70B.items():
        tensors[f"model.layers.0.{name}.weight.write"] = torch.eye(out, growth.K)
        tensors[f"model.layers.0.{name}.weight.read"] = torch.eye(into, growth.K)
    path = tmp_path / "basis.safetensors"
    SpuriousBasis.from_tensors(tensors).save(path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(growth.plan_one_rank, (kind, ranks, 1, path))
    write = sum(into for _, into in growth.LLAMA_70B.values())
    shapes = growth.LLAMA_70B.values()
    cut = [{-(-out * into // ranks) * i // into for i in range(1, ranks)} for out, into in shapes]
    numbers = growth.K * (write + cut_rows * sum(len(rows) for rows in cut))
    assert abs(found["reduced"] - 4 * numbers) <= 0.001 * 4 * numbers
    assert found["pins"] == found["sketches"] >= found["reduced"]
    assert found["all"] >= found["basis"] + found["pins"] + found["sketches"]
