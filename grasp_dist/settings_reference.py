"""Every setting of a tree, with its type, default and help text: what `grasp-dist settings` prints."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grasp_dist.settings import kinds_of, sections_of

__all__ = ["Setting", "as_markdown", "as_text", "settings_of"]

_PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Setting:
    """One setting of a tree."""

    path: str
    """As on the command line; `<name>` is a key of the user's own, `[]` an element of a list, and `{kind: ...}` says
    for which of several kinds of section the setting is."""
    type: str
    default: str
    """In YAML; empty where there is none, so that it has to be given."""
    help: str


def settings_of(model: type[BaseModel], path: str = "", seen: tuple[type[BaseModel], ...] = ()) -> Iterator[Setting]:
    """The model's settings and those of the sections in it, in the order of their definition."""
    for name, field in model.model_fields.items():
        own = f"{path}.{name}" if path else name
        sections = [section for section in sections_of(field.annotation) if section not in seen]
        kind = get_origin(_without_null(field.annotation))
        own += {list: "[]", dict: ".<name>"}.get(kind, "") if sections else ""
        yield Setting(own, _type(field.annotation), _default(field), " ".join((field.description or "").split()))
        for section in sections:
            inner = f"{own}{{kind: {kinds_of(section)[0]}}}" if len(sections) > 1 else own
            for one in settings_of(section, inner, (*seen, section)):
                if len(sections) == 1 or one.path != f"{inner}.kind":
                    yield one


def as_text(settings: list[Setting]) -> str:
    """For a terminal: a line with path, type and default, and the help text under it."""
    lines = []
    for one in settings:
        default = f" = {one.default}" if one.default else ", has to be given"
        lines.append(f"{one.path}  ({one.type}{'' if one.type == _SECTION else default})")
        if one.help:
            lines.append(f"    {one.help}")
    return "\n".join(lines)


def as_markdown(settings: list[Setting]) -> str:
    """A table for each section of the top level."""
    text, section = _HEAD, None
    for one in settings:
        first = one.path.partition(".")[0].removesuffix("[]").removesuffix("<name>")
        inner = any(other.path.startswith((f"{first}.", f"{first}[]")) for other in settings)
        heading = first if inner else "the run"
        if heading != section:
            text += f"\n## {heading}\n\n| setting | type | default | |\n| --- | --- | --- | --- |\n"
            section = heading
        default = f"`{_cell(one.default)}`" if one.default else ""
        text += f"| `{one.path}` | {_cell(one.type)} | {default} | {_cell(one.help)} |\n"
    return text.rstrip()


_SECTION = "settings of its own"
_HEAD = """# Every setting

    grasp-dist settings                 # this list, on the terminal
    grasp-dist settings project.check   # those with these words in their name

made from the code by `grasp-dist settings --markdown`. A setting stands in the YAML file, or on the command line
(`--project.rank 4`). `<name>` is a key of your own, `[]` an element of a list, and `{kind: ...}` says for which kind of
section a setting is. Without a default it has to be given.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


def _without_null(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        others = [one for one in get_args(annotation) if one is not type(None)]
        return others[0] if len(others) == 1 else annotation
    return annotation


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " or ".join(str(one) for one in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(one) for one in inner))
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"by name: {_type(inner[1])}" if sections_of(annotation) else "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _SECTION
    return _PLAIN.get(annotation, "anything")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "{}"
    if isinstance(value, dict):
        return "{" + ", ".join(value) + "}"
    return value if isinstance(value, str) and value else json.dumps(value)
