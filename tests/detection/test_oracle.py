"""The supervised oracle: contrast directions through the real forward pass, and angles between bases."""

import math

import pytest
import torch
from planted import generator
from tiny_models import tiny_model

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection import close_residual_basis
from grasp_dist.detection.oracle import contrast_directions, principal_angles
from grasp_dist.errors import InputError

FIRST = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14]]
SECOND = [[20, 21, 22], [23, 24, 25, 26], [27, 28]]


def _hidden(model: torch.nn.Module, prompt: list[int], layer: int) -> torch.Tensor:
    """The stream after a layer, as transformers itself returns it (not of the last one, which it normalises)."""
    with torch.no_grad():
        return model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer + 1][0].double()


@pytest.mark.parametrize("token", ["last", "mean"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_difference_of_means(architecture: str, token: str) -> None:
    model = tiny_model(architecture)
    found = contrast_directions(model, FIRST, SECOND, token=token)
    assert sorted(found) == [0, 1]

    def mean(prompts: list[list[int]]) -> torch.Tensor:
        states = [_hidden(model, prompt, 0) for prompt in prompts]
        return torch.stack([one[-1] if token == "last" else one.mean(0) for one in states]).mean(0)

    difference = mean(FIRST) - mean(SECOND)
    assert found[0][:, 0].allclose(difference / difference.norm(), atol=1e-5)
    assert not model._modules["lm_head"]._forward_hooks
    assert close_residual_basis(found, model).weights


def test_pairs() -> None:
    model = tiny_model("llama")
    found = contrast_directions(model, FIRST, SECOND, kind="pca", rank=3)
    rows = torch.stack(
        [_hidden(model, a, 0)[-1] - _hidden(model, b, 0)[-1] for a, b in zip(FIRST, SECOND, strict=True)]
    )
    right = torch.linalg.svd(rows, full_matrices=False)[2]
    assert (found[0].mT @ right.mT).abs().allclose(torch.eye(3, dtype=torch.float64), atol=1e-4)
    assert ((rows @ found[0]).sum(0) > 0).all()


def test_prompts_that_do_not_differ_have_no_direction() -> None:
    assert contrast_directions(tiny_model("llama"), FIRST, FIRST) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": []}, "at least one prompt"),
        ({"first": [[1], []]}, "at least one token"),
        ({"kind": "pca", "first": FIRST[:2]}, "there are 2 and 3"),
        ({"kind": "pca", "rank": 4}, "rank 4 is asked of 3"),
        ({"rank": 2}, "rank 2 is asked of 1"),
        ({"kind": "lda"}, "kind 'lda'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        contrast_directions(tiny_model("llama"), **({"first": FIRST, "second": SECOND} | arguments))


def test_angles_in_degrees_and_pooled() -> None:
    turned = torch.zeros(10, 1)
    turned[0], turned[5] = math.cos(0.5), math.sin(0.5)
    one = SpuriousBasis.from_tensors(
        {"a.write": torch.eye(10, 1), "b.read": torch.eye(20, 2), "c.read": torch.eye(4, 1)}
    )
    two = SpuriousBasis.from_tensors({"a.write": turned, "b.read": torch.eye(20, 4)})
    found = principal_angles(one, two)
    assert found.angles["a.write"] == pytest.approx([math.degrees(0.5)], abs=1e-4)
    assert found.angles["b.read"] == pytest.approx([0.0, 0.0], abs=1e-4)
    assert found.overlap == pytest.approx((math.cos(0.5) ** 2 + 2) / 3, abs=1e-6)
    assert found.chance == pytest.approx((1 / 10 + 2 * 4 / 20) / 3)


def test_chance_is_what_random_bases_reach() -> None:
    overlaps = []
    for seed in range(60):
        pair = [torch.linalg.qr(torch.randn(30, k, generator=generator(2 * seed + k)))[0] for k in (2, 5)]
        found = principal_angles(*(SpuriousBasis.from_tensors({"a.write": columns}) for columns in pair))
        overlaps.append(found.overlap)
    assert sum(overlaps) / 60 == pytest.approx(found.chance, rel=0.15)


def test_bases_with_nothing_in_common() -> None:
    one, two = (SpuriousBasis.from_tensors({f"{name}.write": torch.eye(4, 1)}) for name in "ab")
    with pytest.raises(InputError, match="no weight and side in common"):
        principal_angles(one, two)
    stack = SpuriousBasis.from_tensors({"a.write": torch.eye(4, 1).expand(3, 4, 1)})
    with pytest.raises(InputError, match="stacked experts"):
        principal_angles(stack, stack)
