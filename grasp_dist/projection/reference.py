"""The mathematics of the projection, dense and in one process: the oracle that every fast path is tested against.

A protected weight W is (out, in). U (out, k_w) holds the write side and V (in, k_r) the read side: orthonormal
directions that training must not change W along. Any dtype; `None` for a side that is not protected.

Suffixes: O output, I input, W write directions, R read directions, K directions of a LoRA factor.

Source: gradient projection is GRASP (Gilligan-Lee, Egan, Zhu, O'Riordan, arXiv 2605.27676); which sides, and pinning,
are ours (docs/choices.md).
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["pin", "pin_lora", "project_gradient", "remove", "sketches"]


def project_gradient(grad_OI: Tensor, U_OW: Tensor | None = None, V_IR: Tensor | None = None) -> Tensor:
    """(I - U U^T) G (I - V V^T)."""
    if U_OW is not None:
        grad_OI = grad_OI - U_OW @ (U_OW.T @ grad_OI)
    if V_IR is not None:
        grad_OI = grad_OI - (grad_OI @ V_IR) @ V_IR.T
    return grad_OI


def sketches(
    weight_OI: Tensor, U_OW: Tensor | None = None, V_IR: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """C = U^T W (k_w, in) and D = W V (out, k_r): what is recorded before training, and restored at every step."""
    sketch_WI = None if U_OW is None else U_OW.T @ weight_OI
    sketch_OR = None if V_IR is None else weight_OI @ V_IR
    return sketch_WI, sketch_OR


def pin(
    weight_OI: Tensor,
    pins: tuple[Tensor | None, Tensor | None],
    U_OW: Tensor | None = None,
    V_IR: Tensor | None = None,
) -> Tensor:
    """The nearest weight with U^T W = C0 and W V = D0, where (C0, D0) = pins are the `sketches` of one weight W0.

    Both sides come from the sketches of the same W; applying the two one-sided corrections to the same sketches would
    subtract the part that lies on both sides, U (U^T W V) V^T, twice.
    """
    pin_WI, pin_OR = pins
    sketch_WI, sketch_OR = sketches(weight_OI, U_OW, V_IR)
    delta_WI = None if sketch_WI is None or pin_WI is None else sketch_WI - pin_WI
    delta_OR = None if sketch_OR is None or pin_OR is None else sketch_OR - pin_OR
    return remove(weight_OI, delta_WI, delta_OR, U_OW, V_IR)


def remove(
    weight_OI: Tensor,
    delta_WI: Tensor | None,
    delta_OR: Tensor | None,
    U_OW: Tensor | None = None,
    V_IR: Tensor | None = None,
) -> Tensor:
    """W - U (dC - (dC V) V^T) - dD V^T. With dC = U^T G and dD = G V of a gradient G, it is `project_gradient`."""
    if delta_WI is not None and U_OW is not None:
        if V_IR is not None:
            delta_WI = delta_WI - (delta_WI @ V_IR) @ V_IR.T
        weight_OI = weight_OI - U_OW @ delta_WI
    if delta_OR is not None and V_IR is not None:
        weight_OI = weight_OI - delta_OR @ V_IR.T
    return weight_OI


def pin_lora(
    A_KI: Tensor, B_OK: Tensor, U_OW: Tensor | None = None, V_IR: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The factors of W + s B A with A V = 0 (the update reads nothing along V) and U^T B = 0 (writes nothing along U).

    The same for their gradients. Assumes that the adapter starts from a zero update (B = 0).
    """
    return project_gradient(A_KI, None, V_IR), project_gradient(B_OK, U_OW, None)
