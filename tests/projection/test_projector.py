"""GraspProjector in one process: hooks, order of operations, LoRA, extend, checkpoints, memory."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from torch import nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from grasp_dist.projection import GraspProjector, work
from grasp_dist.projection.reference import pin, project_gradient, sketches
from tests.projection.projection_cases import Watch, Zoo, draw, orthonormal, relative_error, zoo_basis


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 12)
        self.second = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


U, V = orthonormal(12, 3, 1), orthonormal(7, 2, 2)
BASIS = SpuriousBasis.from_tensors({"first.weight.write": U, "first.weight.read": V})
MORE = SpuriousBasis.from_tensors(
    {"first.weight.write": orthonormal(12, 2, 3), "second.weight.read": orthonormal(12, 2, 4)}
)


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def _backward(model: nn.Module, seed: int = 0) -> None:
    model(draw(9, 7, seed=seed, dtype=torch.float32)).square().sum().backward()


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        _backward(model, step)
        optimizer.step()


def _change(model: Net, start: dict) -> float:
    """Share of the change of `first` that lies along U and V."""
    delta = model.first.weight.detach() - start["first.weight"]
    inside = delta - project_gradient(delta, U, V)
    return (inside.norm() / delta.norm()).item()


def test_pinning_is_what_holds_and_projection_alone_is_not():
    """The design's reason for two parts: AdamW rotates a projected gradient back into the subspace."""
    shares = {}
    for name, settings in {"none": None, "gradient": {"pin": False}, "both": {}}.items():
        model = _net()
        start = copy.deepcopy(model.state_dict())
        optimizer = _adamw(model)
        if settings is not None:
            GraspProjector(model, BASIS, **settings).attach(optimizer)
        _train(model, optimizer, 100)
        shares[name] = _change(model, start)
    assert shares["both"] < 1e-5 < 1e-3 < shares["gradient"] < shares["none"]


def test_project_gradients_comes_before_clipping_and_is_done_once_per_step(monkeypatch):
    model = _net()
    projector = GraspProjector(model, BASIS)
    optimizer = _adamw(model)
    projector.attach(optimizer)
    passes = []
    for name in ("project", "restore"):
        run = getattr(projector._runtime, name)

        def noted(*args, name=name, run=run, **kwargs):
            passes.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(projector._runtime, name, noted)
    _backward(model)
    gradient = model.first.weight.grad.clone()
    projector.project_gradients()
    assert relative_error(model.first.weight.grad, project_gradient(gradient, U, V)) < 1e-6
    norm = torch.nn.utils.clip_grad_norm_([model.first.weight], 1e-3)
    assert norm < gradient.norm()
    clipped = model.first.weight.grad.clone()
    optimizer.step()
    assert torch.equal(model.first.weight.grad, clipped)
    assert passes == ["project", "restore"]
    _train(model, optimizer, 1)
    assert passes == ["project", "restore"] * 2  # without the call, the hook projects


def test_switches():
    for settings, pin_on, gradient_on in (({"gradient": False}, True, False), ({"pin": False}, False, True)):
        model = _net()
        start = model.first.weight.detach().clone()
        projector = GraspProjector(model, BASIS, **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        projector.attach(optimizer)
        _backward(model)
        gradient = model.first.weight.grad.clone()
        with torch.no_grad():
            model.first.weight += 1
        optimizer.step()
        assert torch.equal(model.first.weight.grad, gradient) != gradient_on
        assert ((U.T @ (model.first.weight - start)).norm() < 1e-4) == pin_on


def test_a_weight_is_pinned_where_training_moved_it():
    model = _net()
    W0 = model.first.weight.detach().double()
    projector = GraspProjector(model, BASIS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    projector.attach(optimizer)
    moved = W0 + draw(12, 7, seed=5)
    with torch.no_grad():
        model.first.weight.copy_(moved)
    assert projector.residual()["first.weight"] > 0.1
    optimizer.step()
    both = U.double(), V.double()
    assert relative_error(model.first.weight, pin(moved, sketches(W0, *both), *both)) < 1e-6
    assert projector.residual()["first.weight"] < 1e-6


def test_rank_and_side_choose_the_first_columns():
    model = _net()
    projector = GraspProjector(model, BASIS, side="write", rank=2)
    assert projector.basis.basis_rank("first.weight", "write") == 2
    assert torch.equal(projector.basis.tensor("first.weight", "write"), U[:, :2])
    assert projector.state_dict().keys() == {"first.weight.write", "first.bias.write"}


def test_lora_starts_off_the_read_side_and_keeps_the_function():
    model = Zoo()
    with torch.no_grad():
        model.adapted.lora_A["default"].weight.copy_(draw(5, 8, seed=1))
    before = model.adapted.lora_A["default"].weight.detach().clone()
    basis = zoo_basis("both").only(["adapted.weight"])
    projector = GraspProjector(model, basis)
    V_IR = basis.tensor("adapted.weight", "read")
    assert torch.allclose(model.adapted.lora_A["default"].weight, project_gradient(before, None, V_IR), atol=1e-6)
    assert projector.parameters == ("adapted.lora_A.default.weight", "adapted.lora_B.default.weight")
    assert all(not pin.any() for pin in projector.state_dict().values())


def test_peft_names_and_frozen_weights():
    """PEFT's prefixes are stripped; weights of the basis without an adapter cannot move and are passed over."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_net(), LoraConfig(r=2, target_modules=["first"], init_lora_weights=True))
    basis = BASIS.union(MORE)
    projector = GraspProjector(model, basis)
    assert projector.parameters == ("first.lora_A.default.weight", "first.lora_B.default.weight")
    assert projector.unprotected == ()
    optimizer = _adamw(model)
    projector.attach(optimizer)
    _train(model, optimizer, 20)
    layer = model.base_model.model.first
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    assert B.norm() > 1e-2
    update = layer.get_delta_weight("default").detach()
    assert (basis.tensor("first.weight", "write").T @ update).norm() < 1e-6 * B.norm() * A.norm()
    assert (update @ V).norm() < 1e-6 * B.norm() * A.norm()


def test_a_trained_adapter_can_be_continued_under_its_own_basis_only():
    model = Zoo()
    with torch.no_grad():
        model.adapted.lora_B["default"].weight.copy_(draw(15, 5, seed=1))
    basis = zoo_basis("both").only(["adapted.weight"])
    with pytest.raises(InputError, match="does not start from zero"):
        GraspProjector(model, basis)
    with torch.no_grad():
        for factor, sides in (("lora_B", ("write", None)), ("lora_A", (None, "read"))):
            weight = getattr(model.adapted, factor)["default"].weight
            columns = [None if side is None else basis.tensor("adapted.weight", side) for side in sides]
            weight.copy_(project_gradient(weight, *columns))
    kept = model.adapted.lora_B["default"].weight.clone()
    GraspProjector(model, basis)
    assert torch.allclose(model.adapted.lora_B["default"].weight, kept, atol=1e-6)


def test_unprotected_weights_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        projector = GraspProjector(_net(), BASIS)
    assert projector.unprotected == ("second.weight",)
    assert "second.weight" in caplog.text


# -- extend


def test_extend_before_training_equals_the_union():
    model, twin = _net(), _net()
    extended, whole = GraspProjector(model, BASIS), GraspProjector(twin, BASIS.union(MORE))
    optimizer, other = _adamw(model), _adamw(twin)
    extended.attach(optimizer)
    extended.extend(MORE)
    whole.attach(other)
    _train(model, optimizer, 10)
    _train(twin, other, 10)
    assert extended.parameters == whole.parameters
    for name, value in model.state_dict().items():
        assert relative_error(value, twin.state_dict()[name]) < 1e-5, name


def test_extend_in_mid_run_pins_to_the_weights_before_training():
    model = _net()
    start = copy.deepcopy(model.state_dict())
    projector = GraspProjector(model, BASIS)
    optimizer = _adamw(model)
    projector.attach(optimizer)
    _train(model, optimizer, 10)
    with pytest.raises(InputError, match="gains directions after training has begun"):
        projector.extend(MORE)
    assert projector.basis is BASIS
    projector.extend(MORE, initial=start)
    joined = projector.basis.tensor("first.weight", "write")
    assert joined.shape == (12, 5)
    for _ in range(2):
        delta = model.first.weight.detach() - start["first.weight"]
        assert (joined.T @ delta).norm() < 1e-5
        assert (delta @ V).norm() < 1e-5
        second = (model.second.weight.detach() - start["second.weight"]) @ MORE.tensor("second.weight", "read")
        assert second.norm() < 1e-5
        assert (model.first.weight.detach() - start["first.weight"]).norm() > 1e-2
        _train(model, optimizer, 10)


def test_extend_from_nothing_is_warm_deflation():
    """The first round has no basis; directions found in an adapter that has been trained are projected off it."""
    model = Zoo()
    factors = model.adapted.lora_A["default"].weight, model.adapted.lora_B["default"].weight
    projector = GraspProjector(model, None)
    optimizer = torch.optim.AdamW(factors, lr=0.1)
    projector.attach(optimizer)
    for seed in range(3):
        for factor in factors:
            factor.grad = draw(*factor.shape, seed=seed, dtype=torch.float32)
        optimizer.step()
    assert projector.residual() == {}
    basis = zoo_basis("both").only(["adapted.weight"])
    write, read = (basis.tensor("adapted.weight", side) for side in ("write", "read"))
    assert (write.T @ factors[1]).norm() > 0.01
    projector.extend(basis)
    assert (write.T @ factors[1]).norm() < 1e-5
    assert (factors[0] @ read).norm() < 1e-5
    optimizer.step()
    assert projector.residual()["adapted.weight"] < 1e-6


# -- state


def test_state_dict_restores_the_pins_of_an_earlier_run():
    model = _net()
    start = copy.deepcopy(model.state_dict())
    projector = GraspProjector(model, BASIS)
    buffer = io.BytesIO()
    torch.save(projector.state_dict(), buffer)
    optimizer = _adamw(model)
    projector.attach(optimizer)
    _train(model, optimizer, 5)
    with torch.no_grad():
        model.first.weight.mul_(1.5)  # not what the run would resume from: pins taken here would be wrong
    resumed = GraspProjector(model, BASIS)
    resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert resumed.residual()["first.weight"] > 0.1
    optimizer = _adamw(model)
    resumed.attach(optimizer)
    optimizer.step()
    assert (U.T @ (model.first.weight.detach() - start["first.weight"])).norm() < 1e-5
    with pytest.raises(InputError, match="after training has begun"):
        resumed.extend(MORE)


def test_state_dict_of_another_basis_is_refused():
    projector = GraspProjector(_net(), BASIS)
    state = projector.state_dict()
    with pytest.raises(InputError, match=r"first\.weight\.read.*not protected here"):
        GraspProjector(_net(), BASIS, side="write").load_state_dict(state)
    with pytest.raises(InputError, match=r"second\.weight\.read.*missing from the checkpoint"):
        GraspProjector(_net(), BASIS.union(MORE)).load_state_dict(state)
    with pytest.raises(InputError, match=r"\(3, 7\) in the checkpoint and \(1, 7\) here"):
        GraspProjector(_net(), BASIS, rank=1).load_state_dict(state)


def test_pins_that_are_not_finite_are_refused():
    projector = GraspProjector(_net(), BASIS)
    state = {name: torch.full_like(pin, torch.nan) for name, pin in projector.state_dict().items()}
    with pytest.raises(InputError, match="NaN or infinity"):
        projector.load_state_dict(state)


def test_a_start_that_is_transposed_is_refused():
    model = _net()
    projector = GraspProjector(model, BASIS)
    optimizer = _adamw(model)
    projector.attach(optimizer)
    _train(model, optimizer, 2)
    start = {name: value.T if value.ndim == 2 else value for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"initial\['first.weight'\] has shape \(7, 12\).*as the model stores it"):
        projector.extend(MORE, initial=start)


def test_detach_lets_go():
    model = _net()
    projector = GraspProjector(model, BASIS)
    optimizer = _adamw(model)
    projector.attach(optimizer)
    projector.detach()
    _train(model, optimizer, 3)
    assert projector.residual()["first.weight"] > 1e-4
    projector.attach(optimizer)
    _train(model, optimizer, 1)
    assert projector.residual()["first.weight"] < 1e-6


# -- cost


def _big(dtype: torch.dtype) -> tuple[nn.Linear, GraspProjector]:
    model = nn.Linear(96, 128, bias=False, dtype=dtype)
    basis = SpuriousBasis.from_tensors({"weight.write": orthonormal(128, 2, 0), "weight.read": orthonormal(96, 2, 1)})
    model.weight.grad = draw(128, 96, seed=2, dtype=dtype)
    return model, GraspProjector(model, basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_allocates_nothing_of_a_weights_size(dtype, monkeypatch):
    monkeypatch.setattr(work, "SCRATCH_NUMEL", 96 * 10)
    model, projector = _big(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    projector.attach(optimizer)
    with Watch() as watch:
        projector.project_gradients()
        projector._after_step(0)
        projector.residual()
    assert watch.largest <= max(2 * 128, 96 * 10 if dtype is torch.bfloat16 else 0)


def test_the_memory_watch_sees_a_dense_projection():
    """Keeps the test above honest."""
    with Watch() as watch:
        project_gradient(draw(128, 96, seed=0), orthonormal(128, 2, 0).double())
    assert watch.largest >= 128 * 96


def test_sketches_lie_as_products_with_the_weight_make_them():
    """The write side's by direction, the read side's by row: the other way round, each product takes half as long
    again. Views into the flats show it; the numbers do not."""
    _, projector = _big(torch.float32)
    ((part,),) = [entry.parts for entry in projector._plan.entries]
    flats = projector._runtime.flats
    assert part.left_view.of(flats).is_contiguous()
    assert part.right_view.of(flats).mT.is_contiguous()


def test_half_precision_rounds_once(monkeypatch):
    """In pieces of a few rows, the result is the fp64 one rounded to bf16, up to one unit in the last place."""
    monkeypatch.setattr(work, "SCRATCH_NUMEL", 96 * 10)
    model, projector = _big(torch.bfloat16)
    gradient = model.weight.grad.double()
    projector.project_gradients()
    U_OW, V_IR = (projector.basis.tensor("weight", side).double() for side in ("write", "read"))
    wanted = project_gradient(gradient, U_OW, V_IR)
    assert ((model.weight.grad.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-5).all()


def test_precision_settings_of_the_loop_survive_a_pass():
    torch.set_float32_matmul_precision("medium")
    try:
        _, projector = _big(torch.float32)
        projector.project_gradients()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
