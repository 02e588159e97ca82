"""How the pages are made of their templates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grasp_dist.evaluation.verdict import number

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["page_environment"]


def page_environment(folder: Path) -> Environment:
    """Templates of a folder: values are escaped, an unknown name is an error; filters `number` and `percent`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = lambda value: "\N{EN DASH}" if value is None else f"{value:.0%}"
    return environment
