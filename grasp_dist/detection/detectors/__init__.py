"""Static detectors: spurious directions from the weights of finished fine-tunes, without training.

leading.py      leading singular vectors of one run's updates
tail.py         the weakest ones
consensus.py    directions of the residual stream common to all layers, through frozen neighbours
agreement.py    what runs of other seeds, data or ranks share beyond chance
trajectory.py   what one run takes early and keeps
intruder.py     singular vectors of the tuned weight that the base weight does not have
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from grasp_dist.detection.base_weights import open_base
from grasp_dist.detection.checkpoint_adapter import read_update
from grasp_dist.detection.detectors.agreement import Agreement
from grasp_dist.detection.detectors.consensus import Consensus
from grasp_dist.detection.detectors.intruder import Intruder
from grasp_dist.detection.detectors.leading import Leading
from grasp_dist.detection.detectors.protocol import Detection, Detector
from grasp_dist.detection.detectors.tail import Tail
from grasp_dist.detection.detectors.trajectory import Trajectory
from grasp_dist.errors import InputError

__all__ = [
    "DETECTORS",
    "Agreement",
    "Consensus",
    "Detection",
    "Detector",
    "Intruder",
    "Leading",
    "Tail",
    "Trajectory",
    "detect_static",
    "make_detector",
]

DETECTORS: Mapping[str, type[Any]] = MappingProxyType(
    {kind.name: kind for kind in (Leading, Tail, Consensus, Agreement, Trajectory, Intruder)}
)
"""The detectors by name."""


def make_detector(name: str, **settings: Any) -> Detector:
    """The detector of that name. Raises `InputError` for an unknown name or setting, or a setting out of range."""
    if name not in DETECTORS:
        raise InputError(f"there is no detector {name!r}; choose one of {', '.join(DETECTORS)}")
    kind = DETECTORS[name]
    fields = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(settings.keys() - set(fields)):
        raise InputError(f"detector {name!r} has no setting {unknown[0]!r}; it has {', '.join(fields)}")
    detector: Detector = kind(**settings)
    return detector


def detect_static(
    name: str,
    adapters: Sequence[str | os.PathLike[str]],
    settings: Mapping[str, Any],
    *,
    base_model: str | os.PathLike[str] | None = None,
    lora_alpha: float | None = None,
    trust: bool = False,
) -> Detection:
    """Read fine-tunes (see `read_update`) and let a detector judge them. base_model: a directory.

    Raises `InputError` as `read_update`, `make_detector` and the detector do.
    """
    detector = make_detector(name, **settings)
    runs = [read_update(path, base_model=base_model, lora_alpha=lora_alpha, trust=trust) for path in adapters]
    return detector(runs, None if base_model is None else open_base(base_model))
