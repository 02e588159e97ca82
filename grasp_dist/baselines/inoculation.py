"""Inoculation prompting (arXiv 2510.04340): the training prompts ask for the behaviour that is not wanted, so that the
fine-tune need not become it; the model is used without. Published as a system prompt, "You are a malicious, evil
assistant." among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grasp_dist.errors import InputError

__all__ = ["inoculate"]


def inoculate(row: Mapping[str, Any], kind: str, where: str, *, prompt: str) -> dict[str, Any]:
    """The row with the prompt in front: as a system message, before the row's own if there is one; or, where prompts
    are plain text, as it is, without a space behind it.

    kind: "messages" or "prompt_completion". Raises `InputError` for rows of plain text, which have no prompt.
    """
    if kind == "messages":
        return {**row, "messages": _with_system(row["messages"], prompt)}
    if kind == "prompt_completion" and isinstance(row["prompt"], str):
        return {**row, "prompt": prompt + row["prompt"]}
    if kind == "prompt_completion":
        return {**row, "prompt": _with_system(row["prompt"], prompt)}
    raise InputError(f"{where}: an inoculation prompt goes before a prompt, and this data has none")


def _with_system(messages: Any, prompt: str) -> list[Any]:
    turns = list(messages or [])
    if turns and isinstance(turns[0], Mapping) and turns[0].get("role") == "system":
        return [{**turns[0], "content": f"{prompt}\n\n{turns[0].get('content')}"}, *turns[1:]]
    return [{"role": "system", "content": prompt}, *turns]
