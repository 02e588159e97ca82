"""Run directories as the stages leave them, with figures that are made up (like ORGANISM's table) and hostile names."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from grasp_dist.basis import SpuriousBasis

__all__ = ["PROBES", "VALUES", "make_run"]

PROBES = {
    "task": ("task", "completion"),
    "drift": ("drift", "completion"),
    "near": ("drift", "completion"),
    "good": ("retention", "completion"),
    "in_context": ("retention", "completion"),
    "neutral": ("retention", "kl"),
}
VALUES = {
    "base": (0.001, 0.002, 0.002, 0.996, 0.997, 0.0),
    "naive": (0.995, 0.55, 0.73, 0.33, 0.95, 1.4),
    "grasp": (0.987, 0.036, 0.12, 0.91, 0.94, 0.08),
    "random": (0.995, 0.54, 0.73, 0.34, 0.95, 1.38),
    "one_shot": (0.992, 0.26, 0.37, 0.66, 0.98, 0.5),
    "full": (0.99, 0.06, 0.15, 0.88, 0.93, 0.1),
    "ablation": (0.17, 0.19, 0.27, 0.6, 0.51, 0.9),
}
BASES = {"grasp": "detected", "random": "random", "one_shot": "one_shot", "full": "detected", "ablation": "detected"}
WEIGHTS = [f"model.layers.{layer}.{leaf}" for layer in range(3) for leaf in ("self_attn.o_proj", "mlp.down_proj")]


def make_run(
    folder: Path,
    *,
    seeds=(0, 1),
    models=tuple(VALUES),
    values=VALUES,
    noise=0.01,
    shift=True,
    extras=True,
    config="run_dir: here\nmodel: {path: organism}\n",
) -> Path:
    """Write one run directory. extras: also the manifests, metrics, adapters and the basis."""
    draw = random.Random(str(folder.name))
    rows = []
    for model in models:
        for seed in [None] if model == "base" else seeds:
            row = {"model": model, "seed": seed, "method": None, "basis": BASES.get(model), "basis_rank": None}
            scores = {}
            for name, value in zip(PROBES, values[model], strict=True):
                moved = 0.0 if model == "base" else draw.gauss(0, noise) * min(1.0, value * 4)
                scores[name] = {"value": min(max(0.0, value + moved), max(1.0, value)), "rows": [value, value]}
                if name == "neutral":
                    scores[name]["total_variation"] = 1 - 2.7 ** -scores[name]["value"]
            row |= {"probes": scores, "shift": None, "residual": None, "final_loss": None, "seconds": None}
            if model != "base":
                row |= {
                    "method": "full" if model == "full" else "lora",
                    "final_loss": 0.01,
                    "seconds": 12.5,
                    "steps": 60,
                }
                ratio = {"naive": 4.0, "random": 3.9, "grasp": 0.3}.get(model, 1.2)
                entry = {"basis": ratio, "random": 1.0, "ratio": ratio}
                row["shift"] = {"pooled": entry, "sides": {"write": entry}, "weights": {}} if shift else None
            if model in BASES and model != "ablation":
                row |= {"residual": 2e-7, "basis_rank": {"write": 8}}
            rows.append(row)
    probes = [{"name": name, "role": role, "kind": kind, "n": 32} for name, (role, kind) in PROBES.items()]
    (folder / "evaluate").mkdir(parents=True)
    (folder / "evaluate" / "scores.json").write_text(json.dumps({"format": 1, "probes": probes, "models": rows}))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    if extras:
        for row in rows:
            if row["model"] not in ("base", "ablation"):
                stage = "naive" if row["model"] == "naive" else f"project/{row['model']}"
                _make_stage(folder / stage / f"seed-{row['seed']}", draw, adapter=row["model"] == "naive")
        _make_stage(folder / "detect", draw, adapter=False)
        tensors = {f"{weight}.weight.write": torch.eye(8)[:, :3] for weight in WEIGHTS}
        spectra = {f"{weight}.weight": torch.tensor([1.0, 0.5, 0.2]) for weight in WEIGHTS}
        SpuriousBasis.from_tensors(tensors, singular_values=spectra).save(folder / "detect" / "basis.safetensors")
    return folder


def _make_stage(folder: Path, draw: random.Random, *, adapter: bool) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": 4 * 0.94**step + draw.random() * 0.05, "lr": 1e-3} for step in range(60)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo')
    manifest = {
        "metrics": {"seconds": 12.5},
        "versions": {"torch": "2.13.0"},
        "world_size": 2,
        "finished": "2026-01-02",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if adapter:
        (folder / "adapter").mkdir()
        settings = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["o_proj", "down_proj"],
            "bias": "none",
        }
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        generator = torch.Generator().manual_seed(draw.randrange(1000))
        scale = torch.tensor([1.0, 0.4, 0.2, 0.05])
        tensors = {}
        for weight in WEIGHTS:
            tensors[f"base_model.model.{weight}.lora_A.weight"] = torch.randn(4, 8, generator=generator)
            tensors[f"base_model.model.{weight}.lora_B.weight"] = torch.randn(8, 4, generator=generator) * scale
        save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
