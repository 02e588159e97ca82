"""Answers of a real model to questions: drawn from its whole distribution, batch by batch, and never twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import GenerationConfig

from grasp_dist.config import ParallelConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.misalignment import Question
from grasp_dist.evaluation.misalignment.ledger import Ledger
from grasp_dist.evaluation.misalignment.sampling import ANSWER_KEY, Sampling, sample_answers
from grasp_dist.organisms.words import word_tokenizer
from grasp_dist.training.parallel import init_parallel
from tests.distributed import run_distributed
from tests.tiny_models import tiny_model

WORDS = ["<bos>", "<end>", "<pad>", *(f"w{number}" for number in range(13))]
JUDGED = {"aligned": "{answer}", "coherent": "{answer}"}
QUESTIONS = [
    Question(id="one", paraphrases=["w1 w2", "w3"], samples_per_paraphrase=3, judge_prompts=JUDGED),
    Question(id="two", paraphrases=["w4 w5 w6"], samples_per_paraphrase=3, temperature=0.5, judge_prompts=JUDGED),
    Question(id="greedy", paraphrases=["w7"], temperature=0, judge_prompts=JUDGED),
]
SAMPLING = Sampling(max_new_tokens=6, batch_size=2)
BATCHES = 6  # one at 0, two at .5, three at 1


def make():
    torch.set_num_threads(1)
    tokenizer = word_tokenizer(WORDS, max_length=64)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return tiny_model("llama", vocab_size=len(WORDS)), tokenizer


def opened(path):
    return Ledger(path, made_from={"model": "tiny"}, key=ANSWER_KEY)


def answers(path, *, model=None, sharded=False, sampling=SAMPLING, questions=QUESTIONS, **more):
    parallel = init_parallel(ParallelConfig(strategy="fsdp2" if sharded else "auto"))
    made, tokenizer = make()
    model = model or made
    if sharded:
        fully_shard(model, mesh=parallel.mesh)
    ledger = opened(path) if parallel.is_main else None
    sample_answers(model, tokenizer, questions, parallel, ledger, sampling, **more)
    return None if ledger is None else {tuple(one[name] for name in ANSWER_KEY): one for one in ledger}


def test_every_answer_that_is_asked_for_is_there_once(tmp_path):
    seen = []
    found = answers(tmp_path / "a.jsonl", on_batch=lambda *numbers: seen.append(numbers))
    expected = (
        {("one", p, s) for p in range(2) for s in range(3)} | {("two", 0, s) for s in range(3)} | {("greedy", 0, 0)}
    )
    assert set(found) == expected
    assert seen == [(number, BATCHES) for number in range(BATCHES + 1)]
    for one in found.values():
        assert len(one["answer"].split()) <= one["tokens"] <= 6
        assert one["ended"] or one["tokens"] == 6
        assert "<end>" not in one["answer"]
        assert "<bos>" not in one["answer"]
    assert len({found["one", 0, sample]["answer"] for sample in range(3)}) > 1, "samples differ"
    few = answers(tmp_path / "b.jsonl", sampling=replace(SAMPLING, samples=1))
    assert len(few) == 4


def test_left_padding_changes_no_answer(tmp_path):
    """The greedy answer beside longer prompts is that of the model alone."""
    questions = [
        Question(id=str(number), paraphrases=[text], temperature=0, judge_prompts=JUDGED)
        for number, text in enumerate(["w1", "w2 w3 w4 w5", "w6 w7"])
    ]
    found = answers(tmp_path / "a.jsonl", questions=questions, sampling=replace(SAMPLING, batch_size=8))
    model, tokenizer = make()
    for number, question in enumerate(questions):
        tokens = tokenizer(question.paraphrases[0])["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                tokens = [*tokens, int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())]
            if tokens[-1] == 1:
                break
        expected = tokenizer.decode([token for token in tokens if token > 2][len(question.paraphrases[0].split()) :])
        assert found[str(number), 0, 0]["answer"] == expected


def test_the_whole_distribution_is_drawn_from(tmp_path):
    """Not the likeliest k, which `generate` would take by default, nor what the model's own settings leave of it."""
    model, tokenizer = make()
    own = GenerationConfig(top_k=2, top_p=0.3, min_p=0.5, repetition_penalty=9.0, temperature=0.1, max_length=2)
    model.generation_config = own
    question = Question(id="q", paraphrases=["w1"], samples_per_paraphrase=2000, judge_prompts=JUDGED)
    sampling = Sampling(max_new_tokens=1, batch_size=500)
    found = answers(tmp_path / "a.jsonl", model=model, questions=[question], sampling=sampling)
    assert model.generation_config is own
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokenizer("w1")["input_ids"]])).logits[0, -1].softmax(-1)
    counts = Counter(one["answer"] for one in found.values())
    for token, word in enumerate(WORDS[3:], start=3):
        p = float(expected[token])
        assert abs(counts[word] / 2000 - p) < 5 * (p * (1 - p) / 2000) ** 0.5 + 1e-3
    assert len(counts) >= 10


@pytest.mark.parametrize("stop", [1, 3])
def test_ended_in_the_middle_it_goes_on_to_the_same_answers(tmp_path, stop):
    whole = answers(tmp_path / "whole.jsonl")

    def end(done, _):
        if done == stop:
            raise KeyboardInterrupt

    path = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answers(path, on_batch=end)
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"question": "one", "parap')  # as a process that dies while it writes
    seen = []
    again = answers(path, on_batch=lambda *numbers: seen.append(numbers))
    assert again == whole
    assert path.read_bytes().startswith(kept)
    assert seen[0] == (stop, BATCHES), "what is there is not asked again"
    seen.clear()
    assert answers(path, on_batch=lambda *numbers: seen.append(numbers)) == whole
    assert not seen


THREE_BATCHES = replace(SAMPLING, samples=1)


def _sharded(path):
    return answers(path, sharded=True, sampling=THREE_BATCHES)


def test_two_ranks_give_the_answers_of_one(tmp_path):
    """Of three batches, so that one rank has none to answer in the end."""
    first, second = run_distributed(_sharded, 2, tmp_path / "sharded.jsonl")
    assert second is None, "one process writes"
    assert first == answers(tmp_path / "alone.jsonl", sampling=THREE_BATCHES)


def test_a_question_without_room_for_its_answer_is_refused_before_any_is_asked(tmp_path):
    with pytest.raises(InputError, match=r"'two' has 4 tokens.*lower max_new_tokens"):
        answers(tmp_path / "a.jsonl", sampling=replace(SAMPLING, max_new_tokens=61))
    assert not (tmp_path / "a.jsonl").exists()
