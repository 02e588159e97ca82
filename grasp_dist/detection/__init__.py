"""Weights of a fine-tune -> spurious basis."""

from typing import Any

from grasp_dist.detection.adapter import AdapterUpdate, LowRankUpdate, read_adapter
from grasp_dist.detection.alignment import base_alignment
from grasp_dist.detection.base_weights import BaseWeights, open_base
from grasp_dist.detection.checkpoint_adapter import read_update
from grasp_dist.detection.closure import close_residual_basis
from grasp_dist.detection.detectors import DETECTORS, Detection, Detector, detect_static, make_detector
from grasp_dist.detection.full_difference import detect_difference
from grasp_dist.detection.one_shot import detect_basis
from grasp_dist.detection.rank_choice import choose_rank
from grasp_dist.detection.svd import Spectrum, low_rank_svd, spectrum

__all__ = [
    "DETECTORS",
    "AdapterUpdate",
    "BaseWeights",
    "Detection",
    "Detector",
    "LowRankUpdate",
    "Spectrum",
    "base_alignment",
    "choose_rank",
    "close_residual_basis",
    "deflate",
    "detect_basis",
    "detect_difference",
    "detect_static",
    "low_rank_svd",
    "make_detector",
    "open_base",
    "read_adapter",
    "read_update",
    "spectrum",
]


def __getattr__(name: str) -> Any:
    """Deflation trains, so it brings in transformers and peft: only when asked for."""
    if name == "deflate":
        from grasp_dist.detection.deflation import deflate

        return deflate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
