"""Weights of a fine-tune -> spurious basis."""

from typing import Any

from grasp_dist.detection.adapter import AdapterUpdate, LowRankUpdate, read_adapter
from grasp_dist.detection.closure import close_residual_basis
from grasp_dist.detection.one_shot import detect_basis
from grasp_dist.detection.svd import Spectrum, low_rank_svd, spectrum

__all__ = [
    "AdapterUpdate",
    "LowRankUpdate",
    "Spectrum",
    "close_residual_basis",
    "deflate",
    "detect_basis",
    "low_rank_svd",
    "read_adapter",
    "spectrum",
]


def __getattr__(name: str) -> Any:
    """Deflation trains, so it brings in transformers and peft: only when asked for."""
    if name == "deflate":
        from grasp_dist.detection.deflation import deflate

        return deflate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
