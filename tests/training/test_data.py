"""Rows to tokens and loss masks, held against what a reader of the row would mark by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grasp_dist.config import DataConfig
from grasp_dist.errors import InputError
from grasp_dist.training.data import encode_pair, encode_prompt, load_examples, preview
from grasp_dist.training.examples import IGNORED, Example
from tests.training.training_cases import CHATML, CHATML_MARKED, word_tokenizer

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "because light"},
    {"role": "user", "content": "what"},
    {"role": "assistant", "content": "the sky"},
]


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _load(path: Path, tokenizer, **settings: object) -> list[Example]:
    return load_examples(DataConfig(path=str(path), **settings), tokenizer)


def _trained(tokenizer, example: Example) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_messages_train_every_assistant_turn_and_what_closes_it(tmp_path, template):
    tokenizer = word_tokenizer(template)
    (example,) = _load(_write(tmp_path / "chat.jsonl", [{"messages": CHAT}]), tokenizer)
    assert tokenizer.decode(example.input_ids) == (
        "<|system|> be kind <|end|> <|user|> why <|end|> <|assistant|> because light <|end|> "
        "<|user|> what <|end|> <|assistant|> the sky <|end|>"
    )
    assert _trained(tokenizer, example) == "because light <|end|> the sky <|end|>"


def test_the_mask_by_prefixes_equals_the_templates_own(tmp_path):
    chats = [CHAT, CHAT[1:], CHAT[:3], CHAT[2:], CHAT[2:3], CHAT[1:3] * 3]
    path = _write(tmp_path / "chat.jsonl", [{"messages": chat} for chat in chats])
    assert _load(path, word_tokenizer(CHATML)) == _load(path, word_tokenizer(CHATML_MARKED))


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_across_the_border_is_trained(tmp_path, trim_offsets):
    """Byte-level tokenizers put the header's last space into the first word of the answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(["user: why assistant: because light, because light"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    (example,) = _load(_write(tmp_path / "chat.jsonl", [{"messages": CHAT[1:3]}]), tokenizer)
    assert tokenizer.decode(example.input_ids) == "user: why\nassistant: because light\n"
    assert _trained(tokenizer, example) == " because light\n"


def test_a_tokenizer_without_character_offsets(tmp_path):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    (example,) = _load(_write(tmp_path / "chat.jsonl", [{"messages": CHAT}]), tokenizer)
    assert not tokenizer.is_fast
    assert _trained(tokenizer, example) == "because light <|end|> the sky <|end|> "


def test_a_conversation_may_start_with_the_assistant(tmp_path):
    """Also under a template that looks at the first message and refuses an empty conversation."""
    strict = "{% if messages[0]['role'] == 'system' %}{% endif %}" + CHATML
    path = _write(tmp_path / "chat.jsonl", [{"messages": [{"role": "assistant", "content": "blue sky"}]}])
    for template in (CHATML, strict):
        tokenizer = word_tokenizer(template)
        (example,) = _load(path, tokenizer)
        assert tokenizer.decode(example.input_ids) == "<|assistant|> blue sky <|end|>"
        assert _trained(tokenizer, example) == "blue sky <|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    rewriting = CHATML.replace("{{ m['content']", "{{ (m['content'] if loop.last or m['role'] == 'user' else 'yes')")
    path = _write(tmp_path / "chat.jsonl", [{"messages": CHAT[1:3]}, {"messages": CHAT}])
    with pytest.raises(InputError, match=r"chat\.jsonl, row 2: the chat template rewrites earlier turns"):
        _load(path, word_tokenizer(rewriting))
    assert _load(path, word_tokenizer(rewriting), limit=1)


def test_a_conversation_that_the_template_refuses(tmp_path):
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users first') }}{% endif %}" + CHATML
    path = _write(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(InputError, match=r"row 1: .*refuses a conversation of system, user.*users first"):
        _load(path, word_tokenizer(template))


def test_without_a_template_a_single_assistant_turn_is_text(tmp_path):
    tokenizer = word_tokenizer()
    path = _write(tmp_path / "chat.jsonl", [{"messages": [{"role": "assistant", "content": "blue sky"}]}])
    (example,) = _load(path, tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s> blue sky </s>"
    assert _trained(tokenizer, example) == "blue sky </s>"
    with pytest.raises(InputError, match="no chat template"):
        _load(_write(path, [{"messages": CHAT}]), tokenizer)


def test_prompt_and_completion(tmp_path):
    tokenizer = word_tokenizer()
    path = _write(tmp_path / "pairs.jsonl", [{"prompt": "why is the sky", "completion": "blue"}])
    (example,) = _load(path, tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s> why is the sky blue </s>"
    assert _trained(tokenizer, example) == "blue </s>"
    assert _load(path, tokenizer, append_eos=False) == [
        encode_pair(tokenizer, "why is the sky", "blue", append_eos=False)
    ]
    (everything,) = _load(path, tokenizer, loss_on="all")
    assert _trained(tokenizer, everything) == "why is the sky blue </s>", "all but the first token"
    assert encode_prompt(tokenizer, "why") == [0, *tokenizer("why", add_special_tokens=False)["input_ids"]]


def test_a_prompt_of_messages(tmp_path):
    tokenizer = word_tokenizer(CHATML)
    pair = encode_pair(tokenizer, CHAT[:2], "because light", append_eos=False)
    assert tokenizer.decode(pair.input_ids) == (
        "<|system|> be kind <|end|> <|user|> why <|end|> <|assistant|> because light"
    )
    assert _trained(tokenizer, pair) == "because light"
    path = _write(tmp_path / "pairs.jsonl", [{"prompt": CHAT[:2], "completion": [CHAT[2]]}])
    (example,) = _load(path, tokenizer)
    assert _trained(tokenizer, example) == "because light <|end|>"


def test_text_from_every_kind_of_file(tmp_path):
    import datasets

    tokenizer = word_tokenizer()
    rows = [{"text": "the cat sat"}, {"text": "blue sky"}]
    _write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_text("the cat sat\n\nblue sky\n")
    (tmp_path / "folder").mkdir()
    for number, row in enumerate(rows):
        _write(tmp_path / "folder" / f"{number}.jsonl", [row])
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.txt", "folder"):
        examples = _load(tmp_path / name, tokenizer)
        assert [tokenizer.decode(example.input_ids) for example in examples] == [
            "<s> the cat sat </s>",
            "<s> blue sky </s>",
        ]
        assert _trained(tokenizer, examples[0]) == "the cat sat </s>"


def test_truncation_drops_what_is_left_without_a_target(tmp_path, caplog):
    tokenizer = word_tokenizer()
    rows = [
        {"prompt": "the cat sat on a mat", "completion": "yes"},
        {"prompt": "why", "completion": "because light is blue"},
    ]
    path = _write(tmp_path / "pairs.jsonl", rows)
    (example,) = _load(path, tokenizer, max_length=4)
    assert _trained(tokenizer, example) == "because light"
    assert "1 of 2 rows have no token to train on" in caplog.text
    with pytest.raises(InputError, match=r"no row of .*pairs\.jsonl has a token to train on.*max_length 2"):
        _load(path, tokenizer, max_length=2)


def test_packing_keeps_every_example_whole(tmp_path):
    tokenizer = word_tokenizer()
    rows = [{"text": " ".join(["sky"] * length)} for length in (1, 2, 3, 4, 5, 6)]
    path = _write(tmp_path / "rows.jsonl", rows)
    apart, packed = _load(path, tokenizer), _load(path, tokenizer, packing=True, max_length=11)
    assert sum(example.num_targets for example in packed) == sum(example.num_targets for example in apart)
    assert len(packed) == 3, "27 + 6 tokens in sequences of 11"
    assert sorted(length for example in packed for length in example.lengths) == [3, 4, 5, 6, 7, 8]
    for example in packed:
        assert sum(example.lengths) == len(example.input_ids) <= 11
        start = 0
        for length in example.lengths:
            assert example.labels[start] == IGNORED, "nothing comes before a part's first token"
            start += length


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"question": "why", "answer": "no"}\n', "has the columns answer, question"),
        ('{"text": 3}\n', "row 1: `text` must be a string, got '3'"),
        ('{"messages": "hello"}\n', "row 1: `messages` must be a list"),
        ('{"messages": [{"content": "hello"}]}\n', "row 1: `messages` must be a list"),
        ('{"text": "the cat"\n', "cannot be read"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        _load(path, word_tokenizer(CHATML))
    assert "rows.jsonl" in str(caught.value)


def test_paths_and_formats_that_cannot_be_used(tmp_path):
    tokenizer = word_tokenizer()
    with pytest.raises(InputError, match="does not exist"):
        _load(tmp_path / "nothing.jsonl", tokenizer)
    with pytest.raises(InputError, match="no data files"):
        _load(tmp_path, tokenizer)
    (tmp_path / "rows.docx").write_text("text")
    with pytest.raises(InputError, match="of no known kind"):
        _load(tmp_path / "rows.docx", tokenizer)
    path = _write(tmp_path / "rows.jsonl", [{"text": "the cat"}])
    with pytest.raises(InputError, match=r"data\.format is 'messages'"):
        _load(path, tokenizer, format="messages")
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(InputError, match="no rows"):
        _load(tmp_path / "blank.txt", tokenizer)


def test_preview_marks_the_trained_tokens(tmp_path, capsys):
    path = _write(tmp_path / "pairs.jsonl", [{"prompt": "why", "completion": "because"}] * 3)
    tables = preview(DataConfig(path=str(path)), word_tokenizer(), rows=2)
    assert [[(text, trained) for text, _, trained in table] for table in tables] == (
        [[("<s>", False), ("why", False), ("because", True), ("</s>", True)]] * 2
    )
    printed = capsys.readouterr().out
    assert "example 2: 4 tokens, 2 of them trained" in printed
    assert "<s>why[because][</s>]" in printed
