"""The configuration as files and words: YAML in and out, dotted overrides, unknown keys refused with a suggestion."""

from __future__ import annotations

import contextlib
import json
import string
from pathlib import Path
from typing import Any

import yaml

from grasp_dist.config import RunConfig
from grasp_dist.errors import InputError
from grasp_dist.settings import merge, parse_yaml, read_tree, validate

__all__ = ["load_config", "save_config", "split_overrides", "started_in"]

_STARTED_IN = "# Relative paths start in "


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML file and put dotted overrides (see `split_overrides`) on top.

    Raises `InputError` for an unreadable file, an unknown key (with the nearest known one) or a bad value.
    """
    path = Path(path)
    tree = merge(read_tree(path, hint="start from one of the files in recipes/"), overrides or {})
    variables = tree.get("variables") or {}
    if not isinstance(variables, dict):
        raise InputError(f"{path}: `variables` must be a mapping of names to text, not {variables!r}")
    return validate(RunConfig, {key: _substitute(value, variables, path) for key, value in tree.items()}, path)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back. Its first line says for `started_in`
    where relative paths start: the present directory."""
    tree = _escape(config.model_dump(mode="json", exclude={"variables"}))
    text = f"{_STARTED_IN}{json.dumps(str(Path.cwd()))}\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}"
    path = Path(path)
    if path.is_file() and path.read_text() == text:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def started_in(path: str | Path) -> Path | None:
    """Where the relative paths of a configuration that `save_config` has written start; None if it does not say."""
    with contextlib.suppress(OSError, ValueError), Path(path).open(encoding="utf-8") as file:
        if (line := file.readline()).startswith(_STARTED_IN):
            return Path(json.loads(line.removeprefix(_STARTED_IN)))
    return None


def split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the settings out of a command line; returns the other words and the settings as a tree.

    ['run', 'c.yaml', '--project.rank', '8', '--training.seeds=[0,1]', '--nproc', '2'] ->
    (['run', 'c.yaml', '--nproc', '2'], {'project': {'rank': 8}, 'training': {'seeds': [0, 1]}}). A setting is a word
    with a dot in its key, or a section of `RunConfig`; values are read as YAML. Raises `InputError` for one without a
    value.
    """
    tree: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not ("." in key or key in RunConfig.model_fields):
            rest.append(word)
            continue
        if not equals:
            if not queue:
                raise InputError(f"{word} needs a value")
            value = queue.pop(0)
        try:
            leaf = parse_yaml(value)
        except yaml.YAMLError as error:
            raise InputError(f"the value of --{key} is not valid YAML: {error}") from None
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"--{key} is under a key that another option sets to a value")
        node[last] = leaf
    return rest, tree


def _substitute(value: Any, variables: dict[str, Any], path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _substitute(item, variables, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, variables, path) for item in value]
    if isinstance(value, str) and "$" in value:
        try:
            return string.Template(value).substitute(variables)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{path}: cannot fill in {value!r} ({error}); define the name under `variables`, and write $$ for a "
                "plain $"
            ) from None
    return value


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("$", "$$") if isinstance(value, str) else value
