"""The dense mathematics against its own definition, in fp64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_dist.projection.reference import pin, pin_lora, project_gradient, remove, sketches


def _case(out, into, k_w, k_r, seed):
    torch.manual_seed(seed)
    weight, moved, grad = (torch.randn(out, into, dtype=torch.float64) for _ in range(3))
    U = torch.linalg.qr(torch.randn(out, min(k_w, out), dtype=torch.float64))[0] if k_w else None
    V = torch.linalg.qr(torch.randn(into, min(k_r, into), dtype=torch.float64))[0] if k_r else None
    return weight, moved, grad, U, V


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 4), st.integers(0, 999))


@given(sizes)
@settings(max_examples=50, deadline=None)
def test_projected_gradient_is_the_product_of_projectors(size):
    _, _, grad, U, V = _case(*size)
    left = torch.eye(size[0], dtype=torch.float64) - (U @ U.T if U is not None else 0)
    right = torch.eye(size[1], dtype=torch.float64) - (V @ V.T if V is not None else 0)
    projected = project_gradient(grad, U, V)
    torch.testing.assert_close(projected, left @ grad @ right)
    torch.testing.assert_close(project_gradient(projected, U, V), projected)
    C, D = sketches(grad, U, V)
    torch.testing.assert_close(remove(grad, C, D, U, V), projected)


@given(sizes)
@settings(max_examples=50, deadline=None)
def test_pin_restores_both_sketches_and_moves_nothing_else(size):
    weight, moved, _, U, V = _case(*size)
    pinned = pin(moved, sketches(weight, U, V), U, V)
    for found, wanted in zip(sketches(pinned, U, V), sketches(weight, U, V), strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted)
    # What lies on neither side stays as training left it.
    torch.testing.assert_close(project_gradient(pinned, U, V), project_gradient(moved, U, V))


def test_two_one_sided_corrections_of_one_sketch_are_wrong():
    """The formula that the design warns of: it must not agree with `pin`, or the test above proves nothing."""
    weight, moved, _, U, V = _case(8, 6, 2, 2, 0)
    C0, D0 = sketches(weight, U, V)
    C, D = sketches(moved, U, V)
    wrong = moved - U @ (C - C0) - (D - D0) @ V.T
    assert (wrong - pin(moved, (C0, D0), U, V)).norm() > 0.1


def test_lora_factors_neither_write_nor_read():
    torch.manual_seed(0)
    A, B = torch.randn(4, 6, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    _, _, _, U, V = _case(8, 6, 3, 2, 1)
    A1, B1 = pin_lora(A, B, U, V)
    update = B1 @ A1
    assert (U.T @ update).norm() < 1e-12
    assert (update @ V).norm() < 1e-12
    torch.testing.assert_close(update, project_gradient(B @ A, U, V))
