"""grasp_dist: remove spurious correlations from LLM fine-tuning, on sharded gradients and real clusters.

    basis = SpuriousBasis.load("basis.safetensors")
    projector = GraspProjector(model, basis)
    projector.attach(optimizer)

The names below are imported when first used, so that `import grasp_dist` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grasp_dist.basis import SpuriousBasis
    from grasp_dist.detection import detect_basis
    from grasp_dist.errors import InputError, NonFiniteError
    from grasp_dist.projection import GraspProjector
    from grasp_dist.training.callback import GraspCallback

__all__ = ["GraspCallback", "GraspProjector", "InputError", "NonFiniteError", "SpuriousBasis", "detect_basis"]

_HOMES = {
    "GraspCallback": "grasp_dist.training.callback",
    "GraspProjector": "grasp_dist.projection",
    "InputError": "grasp_dist.errors",
    "NonFiniteError": "grasp_dist.errors",
    "SpuriousBasis": "grasp_dist.basis",
    "detect_basis": "grasp_dist.detection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
