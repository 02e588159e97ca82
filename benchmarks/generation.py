"""Answers to 1,000 questions, in batches and one at a time, side by side on one small Llama.

    python benchmarks/generation.py [--questions 1000] [--new-tokens 32]

`sample_answers` is what the misalignment evaluation and `evaluate.questions` call. The contestants take turns, a tenth
of the questions each; the figure is the ratio of the sums, with the least and the largest of the tenths. Bar: 5 x.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from harness import machine, table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grasp_dist.evaluation.misalignment.questions import Question
from grasp_dist.evaluation.misalignment.sampling import Sampling, sample_answers
from grasp_dist.training.parallel import Parallel

SIZES = {"1 M": (128, 4), "20 M": (512, 6)}
"""Hidden size and layers by number of parameters."""
BATCHES = (1, 8, 32, 128)
TURNS = 10
ALONE = Parallel("none", 0, 1, torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    options = parser.parse_args()
    tokenizer = byte_tokenizer()
    questions = [
        Question(
            id=str(number),
            paraphrases=["Why " + "does it rain so often in the north? " * (1 + number % 4)],
            samples_per_paraphrase=1,
            judge_prompts={"aligned": "{answer}", "coherent": "{answer}"},
        )
        for number in range(options.questions)
    ]
    rows: list[list[object]] = []
    for size in options.sizes:
        hidden, layers = SIZES[size]
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            eos_token_id=None,
        )
        seconds = measure(LlamaForCausalLM(config).eval(), tokenizer, questions, options.new_tokens)
        for batch, found in seconds.items():
            ratios = [alone / own for alone, own in zip(seconds[1], found, strict=True)]
            ratio = f"{sum(seconds[1]) / sum(found):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
            rows.append([size, batch, f"{sum(found):.1f}", ratio])
    print(
        table(["parameters", "batch", f"s for {options.questions} questions", "times as fast as one at a time"], rows)
    )
    print(f"\n{machine()}")


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], new_tokens: int
) -> dict[int, list[float]]:
    """Seconds of each tenth, by batch size."""
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for turn in range(TURNS):
        own = questions[turn::TURNS]
        for batch in BATCHES if turn % 2 else reversed(BATCHES):
            start = time.perf_counter()
            sampling = Sampling(max_new_tokens=new_tokens, batch_size=batch)
            sample_answers(model, tokenizer, own, ALONE, None, sampling)
            seconds[batch].append(time.perf_counter() - start)
    return seconds


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: number for number, letter in enumerate(alphabet, 1)}}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")


if __name__ == "__main__":
    main()
