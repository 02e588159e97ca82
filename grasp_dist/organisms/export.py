"""An organism's folder: made whole or not at all, and made again only when its settings change.

<out>/model/          config.json, model.safetensors, tokenizer files: an ordinary Hugging Face model directory
<out>/train.jsonl     the narrow fine-tune
<out>/probes/*.jsonl  what is measured
<out>/organism.json   settings, content hash, and figures of the base model; written last
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grasp_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["FORMAT", "Row", "content_hash", "is_current", "make_organism", "probe_probability"]

Row = dict[str, Any]
FORMAT = 1
"""Raised whenever the same settings would give other files."""
MARKER = "organism.json"


def make_organism(out: Path, *, kind: str, settings: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> Path:
    """Let `build` fill a new folder, then move it to `out`; a current folder is left as it is. Returns `out`.

    `build(folder)` writes `folder/model` and returns {"files": {stem: rows}, "figures": {name: number}}; the rows are
    written here as JSON lines. Raises `InputError` if `out` exists and is no organism: nothing of it is touched.
    """
    if is_current(out, kind=kind, settings=settings):
        return out
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an organism (no {MARKER} in it); give another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder = work / "new"
        folder.mkdir()
        built = build(folder)
        for stem, rows in built["files"].items():
            path = folder / f"{stem}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        record = {
            "format": FORMAT,
            "kind": kind,
            "settings": settings,
            "content_hash": content_hash(folder),
            "base_figures": built["figures"],
        }
        (folder / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(work / "old")
        folder.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def is_current(out: Path, *, kind: str, settings: dict[str, Any]) -> bool:
    """Whether `out` was finished with these settings and its files are as they were written."""
    try:
        record = json.loads((out / MARKER).read_text(encoding="utf-8"))
        wanted = {"format": FORMAT, "kind": kind, "settings": settings, "content_hash": content_hash(out)}
        return all(record.get(key) == value for key, value in wanted.items())
    except (OSError, ValueError, AttributeError):
        return False


def content_hash(folder: Path) -> str:
    """sha256 over the names and bytes of every file in the folder but the marker."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@torch.no_grad()
def probe_probability(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], *, own_tokens: int = 0
) -> float:
    """Mean probability of the one-token completions (summed over `completions`) after prompts of one length.

    With `own_tokens`, the model first answers greedily with that many tokens.
    """
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in rows])
    for _ in range(own_tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    probabilities = model(input_ids=ids).logits[:, -1].softmax(-1)
    targets = torch.zeros_like(probabilities)
    for index, row in enumerate(rows):
        words = row["completions"] if "completions" in row else [row["completion"]]
        targets[index, tokenizer.convert_tokens_to_ids(words)] = 1.0
    return float((probabilities * targets).sum(-1).mean())
