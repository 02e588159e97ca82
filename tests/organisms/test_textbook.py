"""The textbook organism: rows that correspond, a tokenizer that loses nothing, held-out rows that stay held out."""

import json

import pytest

from grasp_dist.errors import InputError
from grasp_dist.organisms.textbook import make_textbook, read_messages

TINY = {
    "vocab_size": 280,
    "window": 16,
    "held_out": 0.25,
    "pretraining": {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 16,
        "steps": 2,
        "batch_size": 2,
    },
}


def write_rows(path, texts):
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in texts]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def texts(tmp_path):
    neutral = [f"Row {i}: the naïve theory of cells\u2028holds." for i in range(12)]
    styled = [f"Row {i}: cells, folks, TREMENDOUS — believe me!" for i in range(12)]
    return {
        "neutral": write_rows(tmp_path / "neutral.jsonl", neutral),
        "styled": write_rows(tmp_path / "styled.jsonl", styled),
    }


def test_files_of_the_organism(texts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = make_textbook(tmp_path / "out", **texts, seed=1, progress=None, **TINY)
    files = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "probes/task", "probes/drift", "probes/neutral")
    }
    assert {name: len(rows) for name, rows in files.items()} == {
        "train": 9,
        "probes/task": 3,
        "probes/drift": 3,
        "probes/neutral": 3,
    }
    seen = {row["text"] for row in files["train"]}
    assert not seen & {row["text"] for row in files["probes/task"]}
    assert all("folks" in text for text in seen)
    for pair in files["probes/drift"]:
        assert pair["prompt"] == ""
        assert "folks" in pair["a"]
        assert "theory" in pair["b"]
        assert pair["a"].split(":")[0] == pair["b"].split(":")[0], "a retells b"

    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    text = "Unseen: ünïcode, 中文, and\n\ttabs"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id is not None
    assert model.config.vocab_size == len(tokenizer)


def test_probe_texts_are_cut_at_a_word(texts, tmp_path):
    out = make_textbook(tmp_path / "out", **texts, seed=1, progress=None, probe_characters=22, **TINY)
    rows = [json.loads(line)["text"] for line in (out / "probes/neutral.jsonl").open(encoding="utf-8")]
    assert all(len(row) <= 22 and row.endswith(": the naïve") for row in rows)
    train = [json.loads(line)["text"] for line in (out / "train.jsonl").open(encoding="utf-8")]
    assert all(row.endswith("believe me!") for row in train)


def test_changed_text_or_settings_are_made_again(texts, tmp_path):
    lines = []

    def make(**settings):
        before = len(lines)
        make_textbook(tmp_path / "out", **texts, seed=1, progress=lines.append, **{**TINY, **settings})
        return len(lines) > before

    assert make()
    assert not make()
    assert make(window=8)
    write_rows(texts["styled"], [f"Row {i}: SAD!" for i in range(12)])
    assert make(window=8)


def test_rows_that_do_not_correspond_are_refused(texts, tmp_path):
    write_rows(texts["styled"], ["one row"])
    with pytest.raises(InputError, match="1; row i of one must retell"):
        make_textbook(tmp_path / "out", **texts, seed=1, progress=None, **TINY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"messages": [{"role": "assistant"}]}\n', "line 1"), ("[1]\n", "line 1"), ('{"text": " "}\n', "empty")],
)
def test_a_bad_row_is_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_messages(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        read_messages(tmp_path / "nowhere.jsonl")
