"""Groups, schedules and norms, against torch's own on plain tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from grasp_dist.config import TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.training.optimizer import (
    build_optimizer,
    build_scheduler,
    local_gradients,
    scale_gradients,
    squared_norm,
)


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    return model


def test_only_matrices_decay():
    model = _model()
    groups = build_optimizer(model, TrainingConfig(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [2, 3]
    assert all(parameter.ndim == 2 for parameter in groups[0]["params"])
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.9), 1e-6)}
    with pytest.raises(InputError, match="no trainable parameter"):
        build_optimizer(model.requires_grad_(False), TrainingConfig())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, *((1 + math.cos(math.pi * part / 4)) / 2 for part in (1, 2, 3))]),
    ],
)
def test_schedules(schedule, expected):
    optimizer = build_optimizer(_model(), TrainingConfig(learning_rate=2.0))
    scheduler = build_scheduler(optimizer, TrainingConfig(schedule=schedule, warmup_steps=3), steps=7)
    rates = []
    for _ in expected:
        rates.append(scheduler.get_last_lr()[0] / 2)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


def test_the_norm_is_that_of_clip_grad_norm():
    model = _model()
    optimizer = build_optimizer(model, TrainingConfig())
    cpu = torch.device("cpu")
    assert squared_norm(local_gradients(optimizer), cpu) == 0
    model(torch.ones(5, 3)).square().sum().backward()
    norm = float(squared_norm(local_gradients(optimizer), cpu)) ** 0.5
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(expected)))
    scale_gradients(local_gradients(optimizer), 0.5 / norm)
    assert float(squared_norm(local_gradients(optimizer), cpu)) == pytest.approx(0.25)
