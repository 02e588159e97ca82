"""A small language model of a real text, to be fine-tuned on the same text retold in another voice (ours).

Two JSONL files are read from paths that the user gives; row i of one retells row i of the other. A byte-level BPE
tokenizer and a Llama are trained from scratch on the neutral rows; the styled retelling of the same rows is the
fine-tune, and rows held out from both are the probes. docs/organisms.md says what this does and does not show.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from grasp_dist.errors import InputError
from grasp_dist.organisms.export import Row, make_organism
from grasp_dist.organisms.pretrain import PretrainSettings, build_llama, pretrain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["TextbookSettings", "make_textbook", "read_messages"]

BOS, EOS = "<s>", "</s>"


class TextbookSettings(BaseModel):
    """Everything that the organism's files depend on; the two texts enter by their hashes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    seed: int
    """Seed of the split, the model's initialisation and its batches."""
    neutral_sha256: str
    styled_sha256: str
    vocab_size: int = Field(default=2048, ge=260)
    """Tokens of the byte-level BPE tokenizer, the two special ones included."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the rows that neither pre-training nor fine-tuning sees."""
    window: int = Field(default=256, ge=8)
    """Tokens of a pre-training sequence, cut from the concatenated rows."""
    probe_characters: int = Field(default=600, ge=16)
    """Held-out rows are cut at the last word before this, so that both texts of a pair fit into one window."""
    pretraining: PretrainSettings = PretrainSettings(
        hidden_size=256, num_layers=4, intermediate_size=512, max_positions=512, steps=500, batch_size=8
    )


def make_textbook(
    out: Path,
    *,
    neutral: Path,
    styled: Path,
    seed: int,
    progress: Callable[[str], Any] | None = print,
    **settings: Any,
) -> Path:
    """Train the textbook organism and write its files to the folder `out`, which is returned.

    `neutral` and `styled` are JSONL files of `messages` rows (or `text` rows) that correspond by index; `settings` are
    the other fields of `TextbookSettings`. A folder made from the same texts and settings is kept as it is.
    Raises `InputError` for files that cannot be read or do not correspond.
    """
    neutral_rows, styled_rows = read_messages(Path(neutral)), read_messages(Path(styled))
    if len(neutral_rows) != len(styled_rows):
        raise InputError(
            f"{neutral} has {len(neutral_rows)} rows and {styled} has {len(styled_rows)}; row i of one must "
            "retell row i of the other, so give two files of equal length"
        )
    checked = TextbookSettings(
        seed=seed, neutral_sha256=_sha256(Path(neutral)), styled_sha256=_sha256(Path(styled)), **settings
    )
    num_held_out = round(checked.held_out * len(neutral_rows))
    if not 0 < num_held_out < len(neutral_rows):
        raise InputError(
            f"{neutral} has {len(neutral_rows)} rows, of which held_out {checked.held_out} leaves {num_held_out} to "
            "probe; give more rows or another share"
        )
    order = torch.randperm(len(neutral_rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, kept = sorted(order[:num_held_out]), sorted(order[num_held_out:])

    def build(folder: Path) -> dict[str, Any]:
        tokenizer = _train_tokenizer([neutral_rows[row] for row in kept], checked)
        model = build_llama(
            len(tokenizer),
            checked.pretraining,
            seed=seed,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
        )
        stream = _stream(tokenizer, [neutral_rows[row] for row in kept])
        if len(stream) <= checked.window:
            raise InputError(
                f"{neutral} gives {len(stream)} tokens to train on, fewer than one window of {checked.window}"
            )

        def batches(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            start = torch.randint(len(stream) - checked.window, (count, 1), generator=generator)
            ids = stream[start + torch.arange(checked.window)]
            return ids, ids

        loss = pretrain(model, batches, checked.pretraining, seed=seed, progress=progress, title="textbook")
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        probed = {
            name: [_cut(rows[row], checked.probe_characters) for row in held_out]
            for name, rows in (("neutral", neutral_rows), ("styled", styled_rows))
        }
        files: dict[str, list[Row]] = {
            "train": [{"text": styled_rows[row]} for row in kept],
            "probes/task": [{"text": text} for text in probed["styled"]],
            "probes/drift": [
                {"prompt": "", "a": a, "b": b} for a, b in zip(probed["styled"], probed["neutral"], strict=True)
            ],
            "probes/neutral": [{"text": text} for text in probed["neutral"]],
        }
        with torch.no_grad():
            held_out_losses = {
                f"{name}_loss": _window_loss(model, _stream(tokenizer, texts), checked.window)
                for name, texts in probed.items()
            }
        return {"files": files, "figures": {"pretraining_loss": loss, **held_out_losses}}

    return make_organism(Path(out), kind="textbook", settings=checked.model_dump(mode="json"), build=build)


def read_messages(path: Path) -> list[str]:
    """The text of each row: its `text`, or the contents of its `messages` joined by blank lines."""
    texts = []
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # splitlines() would cut at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; give the path of a JSONL file") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            text = row["text"] if "text" in row else "\n\n".join(message["content"] for message in row["messages"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: expected a JSON object with `messages` or `text`") from None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{path}, line {number}: the row's text is empty; remove the row from both files")
        texts.append(text)
    return texts


def _train_tokenizer(texts: list[str], settings: TextbookSettings) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=settings.vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=settings.pretraining.max_positions
    )


def _stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All rows in one run of token ids, each as `<s> text </s>`."""
    encoded = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def _cut(text: str, characters: int) -> str:
    """The text up to the last word that ends within `characters`."""
    if len(text) <= characters:
        return text
    head = text[: characters + 1].rsplit(None, 1)[0]
    return head if len(head) <= characters else text[:characters]


def _window_loss(model: Any, stream: Tensor, window: int) -> float:
    """Mean token loss over consecutive windows (a last, shorter one is left out unless it is the only one)."""
    windows = stream.unfold(0, window, window) if len(stream) >= window else stream[None]
    losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in windows]
    return sum(losses) / len(losses)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
