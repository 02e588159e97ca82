"""SafeLoRA (Hsu et al., 2024, arXiv 2405.16833): after a naive fine-tune, updates that lie little in the space of what
alignment changed are projected into it:

    V = W_aligned - W_unaligned,   C = V V^T / |V|_F,   where cos(C B A, B A) <= tau:  B <- C B

Published: tau = 0.5 (0.35 for other data). C is not a projection in the strict sense; it is applied as published. It is
never formed: C B = V (V^T B) / |V|_F takes one weight at a time and k columns.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["safe_lora"]


def safe_lora(A: Tensor, B: Tensor, difference: Tensor, *, threshold: float = 0.5) -> tuple[Tensor, float]:
    """The new B, (out, r), and the cosine that decided.

    difference: V, (out, in). Products in fp64. A weight that alignment did not change, or an update that is zero, is
    left as it is, with cosine 1.
    """
    V, a, b = difference.double(), A.double(), B.double()
    norm = float(V.norm())
    if not norm > 0 or not float((b.mT @ b).trace()) > 0:
        return B, 1.0
    projected = V @ (V.mT @ b) / norm
    # <C B A, B A> and the norms, by r x r products.
    outer = a @ a.mT
    inner = float(((projected.mT @ b) * outer).sum())
    lengths = [float(((one.mT @ one) * outer).sum()) ** 0.5 for one in (projected, b)]
    cosine = inner / (lengths[0] * lengths[1]) if min(lengths) > 0 else 1.0
    return (projected.to(B) if cosine <= threshold else B), cosine
