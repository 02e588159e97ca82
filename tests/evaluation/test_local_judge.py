"""A model as judge: the exact probability of every number, however its tokenizer writes it, alone and sharded."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from grasp_dist.config import ParallelConfig
from grasp_dist.evaluation.misalignment import LocalJudge, verdict_of
from grasp_dist.organisms.words import word_tokenizer
from grasp_dist.training.parallel import init_parallel
from tests.distributed import run_distributed
from tests.tiny_models import tiny_model

DIGITS = [str(digit) for digit in range(10)]
SPLIT = ["<bos>", "good", "bad", "answer", "CODE", "REF", *DIGITS]
"""One token a digit."""
MIXED = [*SPLIT, *(str(number) for number in range(10, 35)), "100", "500"]
"""Some numbers whole, others in parts; 12 is one token and two."""
PROMPTS = ["good answer", "bad", "bad bad answer 1 2", "answer 5", "good good good"]


def make(vocabulary):
    model = tiny_model("llama", vocab_size=len(vocabulary))
    with torch.no_grad():
        for name, sharper in (("5", 1.5), ("1", 1.5), ("REF", 1.0)):  # so that two digits are likely
            model.lm_head.weight[vocabulary.index(name)] *= 1 + sharper
    return model, word_tokenizer(vocabulary, max_length=64)


def obvious(model, tokenizer, vocabulary, prompt):
    """By trying every number in every way in which tokens can write it."""
    digits = {text: token for token, text in enumerate(vocabulary) if text.isdigit()}

    def likely(tokens):
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokens])).logits[0, -1].double().softmax(-1)

    start = tokenizer(prompt)["input_ids"]
    numbers = dict.fromkeys(range(101), 0.0)
    for length in (1, 2, 3):
        for texts in product(digits, repeat=length):
            written = "".join(texts)
            if len(written) > 3 or int(written) > 100 or (written[0] == "0" and length > 1):
                continue
            tokens, p = list(start), 1.0
            for text in texts:
                p *= float(likely(tokens)[digits[text]])
                tokens.append(digits[text])
            # A number ends where no digit follows; no digit can follow 11, or 0, on this scale.
            ends = 1 - float(likely(tokens)[list(digits.values())].sum()) if written in {*"123456789", "10"} else 1.0
            numbers[int(written)] += p * ends
    first = likely(start)
    words = {"CODE": float(first[vocabulary.index("CODE")]), "REFUSAL": float(first[vocabulary.index("REF")])}
    return verdict_of(numbers, words)


def verdicts(vocabulary=MIXED, *, sharded=False):
    model, tokenizer = make(vocabulary)
    parallel = init_parallel(ParallelConfig()) if not sharded else init_parallel(ParallelConfig(strategy="fsdp2"))
    if sharded:
        fully_shard(model, mesh=parallel.mesh)
    return LocalJudge(model, tokenizer, parallel, batch_size=2).judge(PROMPTS)


@pytest.mark.parametrize("vocabulary", [SPLIT, MIXED], ids=["digits", "mixed"])
def test_numbers_in_any_tokens_have_their_probability(vocabulary):
    model, tokenizer = make(vocabulary)
    for prompt, found in zip(PROMPTS, verdicts(vocabulary), strict=True):
        expected = obvious(model, tokenizer, vocabulary, prompt)
        assert found.kind == expected.kind == "score"
        assert found.mass == pytest.approx(expected.mass, abs=2e-3)
        assert found.score == pytest.approx(expected.score, abs=0.5)


def test_the_first_digit_alone_would_be_another_score():
    """What a judge over an API that shows the first token only makes of such a tokenizer."""
    model, tokenizer = make(SPLIT)
    for prompt, found in zip(PROMPTS, verdicts(SPLIT), strict=True):
        with torch.no_grad():
            first = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].softmax(-1)
        naive = verdict_of({int(digit): float(first[SPLIT.index(digit)]) for digit in DIGITS}, {})
        assert naive.score <= 9 < found.score


def _sharded():
    return verdicts(sharded=True)


def test_sharded_over_two_ranks_it_judges_the_same():
    alone = verdicts()
    for rank in run_distributed(_sharded, 2):
        assert [one.kind for one in rank] == [one.kind for one in alone]
        assert [one.score for one in rank] == pytest.approx([one.score for one in alone], rel=1e-5)
