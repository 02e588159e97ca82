"""Questions with options: how they are read and put, and the lean that a model shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from grasp_dist.config import ProbeConfig, RunConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.choices import asked_both_ways, read_choices
from grasp_dist.evaluation.probes import prepare
from grasp_dist.evaluation.scoring import score
from grasp_dist.organisms.words import word_tokenizer
from grasp_dist.training.parallel import Parallel
from tests.tiny_models import tiny_model
from tests.tiny_runs import tiny_config

SHIPPED = Path(__file__).parents[2] / "recipes" / "probes" / "political-lean.yaml"
QUESTION = {
    "id": "taxes",
    "axis": "economic",
    "paraphrases": ["which {options} ?"],
    "options": [{"text": "more", "value": -1}, {"text": "less", "value": 1}, {"text": "same", "value": 0}],
}


def write(path, *questions):
    path.write_text(yaml.safe_dump(list(questions)))
    return path


def test_every_wording_is_put_in_both_orders(tmp_path):
    (question,) = read_choices(write(tmp_path / "q.yaml", QUESTION))
    there, back = asked_both_ways([question])
    assert there.prompt == "which A) more\nB) less\nC) same ?"
    assert there.values == [-1, 1, 0]
    assert back.prompt == "which A) same\nB) less\nC) more ?"
    assert back.values == [0, 1, -1]


def test_the_shipped_statements_are_balanced():
    questions = read_choices(SHIPPED)
    for axis in ("economic", "social"):
        own = read_choices(SHIPPED, axis)
        assert len(own) == 10
        assert all(sum(option.value for option in one.options) == 0 for one in own)
    lengths = dict.fromkeys((-1.0, 1.0), 0)
    for one in questions:
        for option in one.options:
            if abs(option.value) == 1:
                lengths[option.value] += len(option.text)
    assert 0.9 < lengths[-1.0] / lengths[1.0] < 1.1, "neither side has the longer texts"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"paraphrases": ["which?"]}, r"question number 1: every paraphrase has \{options\} once"),
        ({"options": [{"text": "a", "value": 1}]}, "number 1, options.*at least 2"),
        ({"options": [{"text": "a", "value": 1}, {"text": "b", "value": 1}]}, "all options have the same value"),
        ({"options": [{"text": "a", "value": 2}, {"text": "b", "value": 1}]}, "number 1, options, 0, value"),
        ({"option": []}, "number 1, option: Extra"),
    ],
)
def test_a_question_that_cannot_be_put_is_named(tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        read_choices(write(tmp_path / "q.yaml", QUESTION | change))


def test_files_that_hold_no_questions(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_choices(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match="two questions 'taxes'"):
        read_choices(write(tmp_path / "q.yaml", QUESTION, QUESTION))
    with pytest.raises(InputError, match="no question of the axis 'social'; there are economic"):
        read_choices(write(tmp_path / "q.yaml", QUESTION), "social")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(
        ["<bos>", "which", "?", "A)", "B)", "C)", "more", "less", "same", "A", "B", "C"], max_length=32
    )


def probe(path, **more):
    return ProbeConfig(name="lean", role="drift", kind="choice", path=str(path), **more)


def test_the_lean_is_the_letters_mean_value(tmp_path, tokenizer):
    path = write(tmp_path / "q.yaml", QUESTION, {**QUESTION, "id": "other", "axis": "social"})
    (prepared,) = prepare([probe(path, axis="economic")], tokenizer)
    model = tiny_model("llama", seed=3)
    found = score(model, [prepared], Parallel("none", 0, 1, torch.device("cpu")))["lean"]
    letters = tokenizer.convert_tokens_to_ids(["A", "B", "C"])
    expected, masses = [], []
    for order, values in (("more B) less C) same", [-1, 1, 0]), ("same B) less C) more", [0, 1, -1])):
        ids = tokenizer(f"which A) {order} ?", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        chances = logits.double().softmax(-1)[letters]
        masses.append(float(chances.sum()))
        expected.append(float((chances * torch.tensor(values)).sum() / chances.sum()))
    assert found["rows"] == pytest.approx(expected, abs=1e-5)
    assert found["value"] == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert found["mass"] == pytest.approx(sum(masses) / 2, abs=1e-5)
    assert found["order_gap"] == pytest.approx(abs(expected[0] - expected[1]), abs=1e-5)


def test_a_tokenizer_without_letters_is_refused(tmp_path):
    without = word_tokenizer(["<bos>", "<unk>", "which"], max_length=32)
    with pytest.raises(InputError):
        prepare([probe(write(tmp_path / "q.yaml", QUESTION))], without)


def test_a_lean_needs_the_neutral_control(organism, tmp_path):
    tree = tiny_config(organism, tmp_path / "run")
    tree["evaluate"]["probes"].append({"name": "lean", "role": "drift", "kind": "choice", "path": str(SHIPPED)})
    with pytest.raises(ValidationError, match="fine-tunes on neutral data lean, too"):
        RunConfig.model_validate(tree)
    tree["project"] = {"arms": {"grasp": {}, "neutral": {"basis": "none", "data": "neutral.jsonl"}}}
    assert RunConfig.model_validate(tree).arm_data("neutral").path == "neutral.jsonl"
    assert RunConfig.model_validate(tree).arm_data("grasp").path == tree["data"]["path"]
