"""A LoRA-tuned tiny model, random probes of every kind, and a basis, the same in every process."""

import random

import torch
from torch import nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import ProbeConfig
from grasp_dist.evaluation.probes import Probe, ProbeRow
from tests.tiny_models import tiny_model

__all__ = ["make_basis", "make_probes", "tuned_model"]

VOCABULARY = 64
WEIGHTS = {"model.layers.0.self_attn.o_proj.weight": (24, 24), "model.layers.1.mlp.down_proj.weight": (24, 40)}


def tuned_model(*, tuned: bool = True, seed: int = 0) -> nn.Module:
    """A PEFT-wrapped Llama whose adapter does something, or (tuned=False) nothing yet."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=6, target_modules=["o_proj", "down_proj"])
    model = get_peft_model(tiny_model("llama", seed=seed), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and tuned:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            elif "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_probes() -> list[Probe]:
    """Every kind, with rows of many lengths, several completions, an empty prompt and own tokens."""
    draw = random.Random(3)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high))]

    def probe(name: str, rows: list[ProbeRow], **settings: object) -> Probe:
        settings = {"role": "retention", "kind": "completion"} | settings
        return Probe(ProbeConfig(name=name, path="unused.jsonl", **settings), rows)

    one_token = [ProbeRow(tokens(1, 9), [[i] for i in draw.sample(range(VOCABULARY), 4)]) for _ in range(7)]
    shared = [9, 8]
    several = [ProbeRow(tokens(2, 6), [[*shared, 3], [*shared, 4], [5], tokens(3, 5)]) for _ in range(4)]
    pairs = [ProbeRow(tokens(1, 8), [tokens(1, 7), tokens(1, 7)]) for _ in range(6)]
    pairs.append(ProbeRow([], [tokens(3, 3), tokens(5, 5)]))
    losses = []
    for _ in range(5):
        ids = tokens(3, 12)
        losses.append(ProbeRow(ids, labels=[-100, -100, *ids[2:]]))
    asked = [ProbeRow(tokens(3, 8), [[5], [6], [7]], values=[-1.0, 0.5, 1.0]) for _ in range(6)]
    return [
        probe("task", one_token, role="task"),
        probe("several", several),
        probe("tone", one_token[:5], role="drift", own_tokens=2),
        probe("pairs", pairs, role="drift", kind="pair"),
        probe("losses", losses, kind="loss"),
        probe("neutral", [ProbeRow(tokens(2, 12)) for _ in range(5)], kind="kl", positions=4),
        probe("leaning", asked, role="drift", kind="choice"),
    ]


def make_basis(rank: int = 3) -> SpuriousBasis:
    """Both sides of two weights."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for weight, (out, into) in WEIGHTS.items():
        for side, dim in (("write", out), ("read", into)):
            tensors[f"{weight}.{side}"] = torch.linalg.qr(torch.randn(dim, rank, generator=generator))[0]
    return SpuriousBasis.from_tensors(tensors)
