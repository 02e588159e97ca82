"""Typed trees of settings read from YAML, for the run's configuration and for clusters: unknown keys are refused with
the nearest known one. Needs pydantic and PyYAML only."""

from __future__ import annotations

import difflib
import os
import re
import types
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from grasp_dist.errors import InputError

__all__ = [
    "LocalPath",
    "Name",
    "Section",
    "explain",
    "kinds_of",
    "merge",
    "parse_yaml",
    "read_tree",
    "read_yaml",
    "sections_of",
    "validate",
]

LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path on this machine, with ~ expanded."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Of something that gets a folder or a column."""


class Section(BaseModel):
    """A mapping in the file. The docstring under a field is its help text."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


Tree = TypeVar("Tree", bound=Section)


class _Loader(yaml.SafeLoader):
    """Whole numbers are decimal ones: PyYAML would read a time limit of 12:00:00 as 43200, and 022 as 18."""


_INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _INTEGER]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """What a YAML text says; runs nothing. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | os.PathLike[str], what: str) -> Any:
    """The content of a YAML file that is no configuration. Raises `InputError` for a file that cannot be read; `what`
    says what is in it."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not a YAML file: {error}") from None


def read_tree(path: Path, *, hint: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `InputError` for a file that cannot be read or holds something else; `hint`
    says what to start from."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the configuration {path}: {error.strerror}; give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no mapping of settings; {hint}")
    return tree


def validate(model: type[Tree], tree: dict[str, Any], path: Path) -> Tree:
    """The typed tree. Raises `InputError`, which names the file, for an unknown key or a bad value."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, model)}") from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `over` in the place of its own."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Pydantic's findings as one paragraph, an unknown key with its nearest known neighbour."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(root, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            lines.append(f"unknown key {where!r}; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "model_type":
                message = f"{where} has settings of its own, got {item['input']!r}"
                if not any(field.is_required() for field in _section_at(root, item["loc"]).model_fields.values()):
                    message += "; write {} for their defaults, or leave it out"
            elif item["type"].startswith("union_tag"):
                message = f"{where}: {message}"
            elif where and not isinstance(item["input"], dict):
                message = f"{where}: {message} (got {item['input']!r})"
            lines.append(message)
    return "; ".join(lines)


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the section that `path` leads to."""
    return list(_section_at(model, path).model_fields)


def _section_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    entered = [model]
    for part in path:
        field = entered[0].model_fields.get(str(part))
        if field is not None:
            entered = sections_of(field.annotation) or entered
        # Else an index of a list, a key of a mapping, or the kind of one section among several.
        entered = [one for one in entered if part in kinds_of(one)] or entered
    return entered[0]


def kinds_of(section: type[BaseModel]) -> tuple[Any, ...]:
    """What its `kind` may be, where sections are told apart by that."""
    field = section.model_fields.get("kind")
    return () if field is None else get_args(field.annotation)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (list, dict, Union, types.UnionType, Annotated):
        return [section for inner in get_args(annotation) for section in sections_of(inner)]
    return []
