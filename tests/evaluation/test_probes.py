"""Probe files: what is read, how it is tokenised, and what is refused."""

import json

import pytest

from grasp_dist.config import ModelConfig, ProbeConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.probes import prepare
from grasp_dist.training.data import encode_pair, encode_prompt
from grasp_dist.training.model import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(organism):
    return load_tokenizer(ModelConfig(path=str(organism / "model")))


@pytest.fixture
def write(tmp_path):
    def write(*rows, **settings):
        path = tmp_path / "probe.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return ProbeConfig(**({"name": "p", "role": "drift", "path": str(path)} | settings))

    return write


def test_a_completion_is_tokenised_as_in_training(tokenizer, write):
    (probe,) = prepare(
        [write({"prompt": "d0 q1", "completion": "a3"}, {"prompt": "d1 q2", "completions": ["a1", "a2"]})], tokenizer
    )
    prompt = encode_prompt(tokenizer, "d0 q1")
    assert len(prompt) >= 2
    assert probe.rows[0].prompt == prompt
    assert [*prompt, *probe.rows[0].continuations[0]] == encode_pair(
        tokenizer, "d0 q1", "a3", append_eos=False
    ).input_ids
    assert len(probe.rows[1].continuations) == 2
    assert probe.describe() == {"name": "p", "role": "drift", "kind": "completion", "n": 2}


def test_an_answer_that_begins_with_another_is_not_counted_twice(tokenizer, write):
    row = {"prompt": "d0 q1", "completions": ["a1 a2", "a1", "a1", "a2 a1"]}
    (probe,) = prepare([write(row)], tokenizer)
    texts = [tokenizer.convert_ids_to_tokens(ids) for ids in probe.rows[0].continuations]
    assert texts == [["a1"], ["a2", "a1"]]


def test_pairs_and_kl(tokenizer, write):
    (pair,) = prepare([write({"prompt": "", "a": "d0 q1 a1", "b": "d0 q2"}, kind="pair")], tokenizer)
    assert list(map(len, pair.rows[0].continuations)) == [3, 2]
    (kl,) = prepare([write({"text": "d0 q1 a1"}, {"prompt": "d0"}, kind="kl", max_length=3)], tokenizer)
    assert kl.rows[0].prompt == encode_prompt(tokenizer, "d0 q1 a1")[:3]


def test_a_loss_probe_reads_training_rows(tokenizer, write):
    (probe,) = prepare([write({"prompt": "d0 q1", "completion": "a3"}, kind="loss")], tokenizer)
    example = encode_pair(tokenizer, "d0 q1", "a3", append_eos=True)
    assert (probe.rows[0].prompt, probe.rows[0].labels) == (example.input_ids, example.labels)


def test_limit_takes_the_first_rows_and_blank_lines_are_skipped(tokenizer, write):
    (probe,) = prepare(
        [write(*[{"prompt": "d0", "completion": f"a{i}"} for i in range(3)], "", "{broken", limit=2)], tokenizer
    )
    assert len(probe.rows) == 2


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (["", "{'prompt'"], {}, r"line 2 is not JSON"),
        (["[1]"], {}, r"line 1 is not a JSON object"),
        ([], {}, r"has no rows"),
        ([{"prompt": "d0", "completion": "a1"}, {"prompt": "d0"}], {}, r"line 2 has no completion"),
        ([{"prompt": "d0", "completion": ""}], {}, r"line 1 has no completion"),
        ([{"completion": "a1"}], {}, r"line 1 has no prompt"),
        ([{"prompt": "d0", "a": "a1"}], {"kind": "pair"}, r"line 1 lacks 'a' or 'b'"),
        ([{"question": "d0"}], {"kind": "kl"}, r"line 1 has no prompt"),
        ([{"prompt": "d0 q1", "completion": "a1"}], {"max_length": 3}, r"line 1 has 4 tokens.*max_length"),
        ([{"wrong": 1}], {"kind": "loss"}, r"probe 'p'.*probe\.jsonl"),
    ],
)
def test_bad_files_are_refused_by_probe_file_and_line(tokenizer, write, rows, settings, words):
    with pytest.raises(InputError, match=words) as caught:
        prepare([write(*rows, **settings)], tokenizer)
    assert "probe.jsonl" in str(caught.value)
    assert "probe 'p'" in str(caught.value)


def test_a_missing_file_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        prepare([ProbeConfig(name="p", role="task", path="nowhere.jsonl")], tokenizer)
