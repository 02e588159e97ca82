"""Models, tokenizers and examples that the training tests share."""

from __future__ import annotations

from pathlib import Path

import torch

from grasp_dist.training.examples import IGNORED, Example
from tests.tiny_models import tiny_model

__all__ = ["CHATML", "CHATML_MARKED", "random_examples", "reference", "save_mixtral", "save_tiny", "word_tokenizer"]

_TURN = "{{ '<|' + m['role'] + '|> ' }}"
CHATML = (
    "{% for m in messages %}" + _TURN + "{{ m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}" + _TURN + "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' <|end|>' }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ m['content'] + ' <|end|> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
_WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "why",
    "what",
    "is",
    "blue",
    "sky",
    "because",
    "light",
    "yes",
    "no",
    "be",
    "kind",
)


def save_tiny(folder: Path, architecture: str = "llama", **settings: object) -> Path:
    """A model directory with random weights. Returns `folder`."""
    tiny_model(architecture, **settings).save_pretrained(folder)
    return folder


def save_mixtral(folder: Path) -> Path:
    """A model that is saved with one tensor per expert, and fused on loading."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def reference(path: Path):
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def word_tokenizer(template: str | None = None):
    """One token per word; <s> in front of plain text, </s> as end of sequence."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {word: index for index, word in enumerate([*marks, *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = template
    return wrapped


def random_examples(count: int, *, seed: int = 0, vocabulary: int = 64) -> list[Example]:
    """Sequences of 4 to 12 random tokens, of which the last 1 to 5 are trained."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 13, (), generator=generator))
        trained = int(torch.randint(1, min(6, length), (), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        examples.append(Example(ids, [IGNORED] * (length - trained) + ids[-trained:]))
    return examples
