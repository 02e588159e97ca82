"""What 7B, 32B and 70B models need: memory per GPU, basis, pins, wire, node-hours. COMPUTED, not measured.

    python benchmarks/capacity.py

Memory: parameters, gradients and AdamW moments as the training loop keeps them, sharded evenly over the GPUs, plus
the gathered layer (twice, for prefetch) and the head; activations with checkpointing: one (tokens, hidden) tensor per
layer and one layer's own. Time: 6 N FLOPs a token for full fine-tuning, 4 N for LoRA (no weight gradients of the
frozen base), plus 2 N for recomputation, at an assumed 40 % of 989 TFLOP/s (H100, dense bf16).
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MFU, PEAK = 0.40, 989e12
TOKENS_PER_STEP, SEQUENCE, MICRO_BATCH = 16 * 1024, 1024, 2
STEPS = 375  # 6,000 examples at batch 16
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    inter: int
    layers: int
    kv: int
    vocab: int

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(out, in) of a layer's seven linear modules, the two writing ones last."""
        h, i, kv = self.hidden, self.inter, self.kv
        return [(h, h), (kv, h), (kv, h), (i, h), (i, h), (h, h), (h, i)]

    @property
    def num_layer(self) -> int:
        return sum(out * into for out, into in self.linear)

    @property
    def num_parameters(self) -> int:
        return self.layers * self.num_layer + 2 * self.vocab * self.hidden


MODELS = [
    Shape("7B", 4096, 11008, 32, 4096, 32000),
    Shape("32B", 5120, 27648, 64, 1024, 152064),
    Shape("70B", 8192, 28672, 80, 1024, 128256),
]


def row(shape: Shape, method: str, num_gpus: int, basis_rank: int = 8, lora_rank: int = 32) -> list[str]:
    params = shape.num_parameters
    trained = params
    if method == "LoRA":
        trained = shape.layers * sum((out + into) * lora_rank for out, into in shape.linear)
    state = (2 * params + 16 * trained if method == "LoRA" else 16 * params) / num_gpus
    gathered = 2 * 2 * shape.num_layer + 2 * shape.vocab * shape.hidden
    tokens = MICRO_BATCH * SEQUENCE
    activations = (
        2 * tokens * (shape.layers * shape.hidden + 8 * shape.hidden + 3 * shape.inter) + 4 * tokens * shape.vocab
    )
    written = shape.linear[-2:] * shape.layers
    basis = sum(4 * basis_rank * out for out, _ in written) / num_gpus
    # full: one pin row per input and direction on every rank; LoRA: the pins are (k, r), and zero
    sketch = sum(4 * basis_rank * (into if method == "full" else lora_rank) for _, into in written)
    flops = ((4 if method == "LoRA" else 6) + 2) * params * TOKENS_PER_STEP * STEPS
    hours = flops / (PEAK * MFU) / 3600
    return [
        shape.name,
        method,
        str(num_gpus),
        f"{(state + gathered + activations) / GIB:.0f}",
        f"{(basis + sketch) / 2**20:.1f}",
        f"{sketch / 2**20:.1f}",
        f"{hours / GPUS_PER_NODE:.2f}",
        f"{3 * hours / GPUS_PER_NODE:.2f}",
    ]


def main() -> None:
    header = [
        "model",
        "method",
        "GPUs",
        "GiB per GPU",
        "basis + pins, MiB per GPU",
        "sketch on the wire, MiB per pass",
        f"node-hours of a fine-tune ({STEPS} steps)",
        "node-hours of naive + detect + project, at most",
    ]
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for shape, gpus_lora, gpus_full in zip(MODELS, (1, 8, 8), (8, 16, 32), strict=True):
        print("| " + " | ".join(row(shape, "LoRA", gpus_lora)) + " |")
        print("| " + " | ".join(row(shape, "full", gpus_full)) + " |")


if __name__ == "__main__":
    main()
