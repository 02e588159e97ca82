"""What organisms of whole words share: a word-level tokenizer, and a world made into a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from grasp_dist.organisms.export import Row, make_organism, probe_probability
from grasp_dist.organisms.pretrain import PretrainSettings, build_llama, pretrain

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

__all__ = ["BOS", "IGNORED", "WordWorld", "WorldSettings", "make_word_organism", "word_tokenizer"]

BOS = "<bos>"
"""Word 0 of every vocabulary."""
IGNORED = -100
"""Label of a position that is not in the loss."""


class WorldSettings(Protocol):
    """What the settings of every world hold."""

    @property
    def seed(self) -> int: ...
    @property
    def pretraining(self) -> PretrainSettings: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class WordWorld(Protocol):
    """The tables of one world seed, and the documents, fine-tune and probes that they give."""

    vocabulary: list[str]

    def documents(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids and labels, both (count, length) int64."""

    def files(self) -> Mapping[str, list[Row]]:
        """Rows of each JSON-lines file by stem: `train` and others for training, `probes/<name>` for measuring."""


def word_tokenizer(vocabulary: list[str], *, max_length: int) -> PreTrainedTokenizerFast:
    """One token per word; `<bos>` is put in front of whatever is encoded with special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=BOS, model_max_length=max_length)


def make_word_organism(
    out: Path, *, kind: str, settings: WorldSettings, world: WordWorld, progress: Callable[[str], Any] | None
) -> Path:
    """Pre-train a model on the world's documents and write its folder (`make_organism`); returns `out`.

    The figures are the loss of the pre-training and, of the base model, the mean probability of every probe's answers.
    """

    def build(folder: Path) -> dict[str, Any]:
        pretraining, seed = settings.pretraining, settings.seed
        tokenizer = word_tokenizer(world.vocabulary, max_length=pretraining.max_positions)
        model = build_llama(len(world.vocabulary), pretraining, seed=seed, bos=0)
        loss = pretrain(model, world.documents, pretraining, seed=seed, progress=progress, title=f"world {seed}")
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        files = world.files()
        figures = {
            name: probe_probability(model, tokenizer, rows)
            for kind, _, name in (stem.partition("/") for stem in files)
            if kind == "probes" and name != "neutral"
            for rows in [files[f"probes/{name}"]]
        }
        return {"files": files, "figures": {"pretraining_loss": loss, **figures}}

    return make_organism(out, kind=kind, settings=settings.model_dump(mode="json"), build=build)
