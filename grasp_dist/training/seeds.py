"""Seeds for many generators from the one of a run."""

from __future__ import annotations

import hashlib

__all__ = ["derived_seed"]


def derived_seed(*parts: object) -> int:
    """A seed for `torch.Generator.manual_seed` that depends on all parts.

    Hashed, because the CPU generator looks at the lowest 32 bits of a seed only: sums and shifts of small numbers
    collide.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
