"""Every optimizer that runs torch's step hooks leaves the protected weights pinned: preconditioned, 8-bit, averaged."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from grasp_dist.projection import GraspProjector
from tests.distributed import run_distributed
from tests.projection.projection_cases import draw, orthonormal

# 8-bit optimizers quantise the states of parameters with 4096 numbers or more: both weights, and the factors.
INTO, HIDDEN, OUT, LORA_RANK = 72, 64, 72, 64
STEPS = 100
FP32, BF16 = 1e-6, 4e-3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INTO, HIDDEN, bias=False)
        self.norm = nn.LayerNorm(HIDDEN)
        self.second = nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


BASIS = SpuriousBasis.from_tensors(
    {
        "first.weight.write": orthonormal(HIDDEN, 3, 1),
        "first.weight.read": orthonormal(INTO, 2, 2),
        "second.weight.write": orthonormal(OUT, 3, 3),
        "second.weight.read": orthonormal(HIDDEN, 2, 4),
    }
)


def _net(method: str = "full", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Net().to(dtype)
    model.norm.requires_grad_(False)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=LORA_RANK, target_modules=["first", "second"])
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    return model


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _loss(model: nn.Module, seed: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs, targets = draw(16, INTO, seed=seed, dtype=dtype), draw(16, OUT, seed=1000 + seed, dtype=dtype)
    return nn.functional.mse_loss(model(inputs), targets)


def _train(model: nn.Module, optimizers: Sequence[Any], steps: int = STEPS) -> None:
    for seed in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss(model, seed).backward()
        for optimizer in optimizers:
            optimizer.step()


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _moved(model: nn.Module, start: dict[str, Tensor]) -> float:
    """The smallest relative change of a parameter that trains."""
    return min(
        ((parameter.detach() - start[name]).norm() / start[name].norm().clamp_min(1e-3)).item()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def _off_by_hand(model: nn.Module, start: dict[str, Tensor]) -> float:
    """As `residual()`, by definition, for full fine-tuning."""
    values = []
    for name in ("first.weight", "second.weight"):
        change = model.get_parameter(name).detach().double() - start[name].double()
        write, read = (BASIS.tensor(name, side).double() for side in ("write", "read"))
        values.append(max((write.T @ change).norm(), (change @ read).norm()) / start[name].double().norm())
    return max(values).item()


# -- optimizers: rates at which bf16 weights move too


def _torch(kind: str, **settings: Any) -> Callable[[list[nn.Parameter]], Any]:
    return lambda parameters: getattr(torch.optim, kind)(parameters, **settings)


def _from(module: str, kind: str, **settings: Any) -> Callable[[list[nn.Parameter]], Any]:
    def make(parameters: list[nn.Parameter]) -> Any:
        return getattr(pytest.importorskip(module), kind)(parameters, **settings)

    return make


def _deepspeed(kind: str) -> Callable[[list[nn.Parameter]], Any]:
    def make(parameters: list[nn.Parameter]) -> Any:
        if shutil.which("c++") is None:
            pytest.skip("DeepSpeed compiles its kernels, and there is no C++ compiler")
        module = "deepspeed.ops.lion" if "Lion" in kind else "deepspeed.ops.adam"
        return getattr(pytest.importorskip(module), kind)(parameters, lr=3e-3, weight_decay=0.1)

    return make


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "sgd": _torch("SGD", lr=0.5, momentum=0.9, weight_decay=1e-3),
    "sgd-nesterov-fused": _torch("SGD", lr=0.5, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True),
    "adamw-loop": _torch("AdamW", lr=3e-3, weight_decay=0.1, foreach=False),
    "adamw-foreach": _torch("AdamW", lr=3e-3, weight_decay=0.1, foreach=True),
    "adamw-fused": _torch("AdamW", lr=3e-3, weight_decay=0.1, fused=True),
    "adafactor": _torch("Adafactor", lr=1e-2, weight_decay=0.1),
    "adafactor-transformers": _from(
        "transformers.optimization", "Adafactor", lr=3e-3, weight_decay=0.1, relative_step=False, scale_parameter=False
    ),
    "muon": _torch("Muon", lr=2e-2, weight_decay=0.1),
    "lion": _from("bitsandbytes.optim", "Lion", lr=1e-3, weight_decay=0.1),
    "lion-8bit": _from("bitsandbytes.optim", "Lion8bit", lr=1e-3, weight_decay=0.1),
    "adamw-8bit-bitsandbytes": _from("bitsandbytes.optim", "AdamW8bit", lr=3e-3, weight_decay=0.1),
    "adamw-8bit-torchao": _from("torchao.optim", "AdamW8bit", lr=3e-3, weight_decay=0.1),
    "adamw-4bit-torchao": _from("torchao.optim", "AdamW4bit", lr=3e-3, weight_decay=0.1),
}
KERNELS = ("DeepSpeedCPUAdam", "DeepSpeedCPULion")


@pytest.fixture(scope="module", autouse=True)
def _apart() -> Iterator[None]:
    """Where the Makefile installs bitsandbytes and torchao, for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(sys.prefix) / "optimizers")
        yield


@pytest.fixture(autouse=True)
def _uncompiled():
    """torchao compiles its step, which takes longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pinned_in_fp32(name, method):
    model = _net(method)
    start = _snapshot(model)
    projector = GraspProjector(model, BASIS)
    optimizer = OPTIMIZERS[name](_trainable(model))
    projector.attach(optimizer)
    _train(model, [optimizer])
    residual = projector.residual()
    assert sorted(residual) == ["first.weight", "second.weight"]
    assert max(residual.values()) <= FP32
    assert _moved(model, start) > 1e-2
    if method == "full":
        assert _off_by_hand(model, start) <= FP32


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("muon")])
def test_gradients_alone_would_not_do(name):
    """Keeps the tests above honest: what they hold does not hold by itself."""
    model = _net()
    projector = GraspProjector(model, BASIS, pin=False)
    optimizer = OPTIMIZERS[name](_trainable(model))
    projector.attach(optimizer)
    _train(model, [optimizer], 30)
    assert min(projector.residual().values()) > 1e2 * FP32


# The fused SGD of torch 2.12 and 2.13 leaves bf16 weights on CPU as they are (pytorch issue 191763).
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd-nesterov-fused"])
def test_pinned_in_pure_bf16(name, method):
    model = _net(method, torch.bfloat16)
    start = _snapshot(model)
    projector = GraspProjector(model, BASIS)
    optimizer = OPTIMIZERS[name](_trainable(model))
    projector.attach(optimizer)
    _train(model, [optimizer], 30)
    assert max(projector.residual().values()) <= BF16
    assert _moved(model, start) > 1e-2


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "8bit" in name or "4bit" in name])
def test_the_states_are_quantised(name):
    """So that the tests above are about what they say."""
    for method in ("full", "lora"):
        model = _net(method)
        optimizer = OPTIMIZERS[name](_trainable(model))
        _train(model, [optimizer], 1)
        for state in optimizer.state.values():
            assert any(value.dtype is torch.uint8 or type(value) is not Tensor for value in state.values()
                       if isinstance(value, Tensor) and value.numel() >= 4096)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", KERNELS)
def test_deepspeeds_optimizers_without_deepspeed(kind, method):
    """Plain torch optimizers; their kernels are compiled at first use, which takes most of a minute."""
    for dtype, bound in ((torch.float32, FP32), (torch.bfloat16, BF16)):
        model = _net(method, dtype)
        start = _snapshot(model)
        projector = GraspProjector(model, BASIS)
        optimizer = _deepspeed(kind)(_trainable(model))
        projector.attach(optimizer)
        _train(model, [optimizer])
        assert max(projector.residual().values()) <= bound
        assert _moved(model, start) > 1e-2


# -- schedule-free: the weights that are evaluated are an average that the optimizer keeps apart


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_schedule_free_is_pinned_in_train_and_eval_mode(kind, dtype, method):
    """It steps z and the weights y = (1 - beta) z + beta x; x is what eval() puts in place.

    With y alone pinned, z drifts in the subspace by every step's preconditioned gradient and decay, and takes x along:
    residuals of 1e-3 to 1e-2.
    """
    schedulefree = pytest.importorskip("schedulefree")
    model = _net(method, dtype)
    start = _snapshot(model)
    projector = GraspProjector(model, BASIS)
    rate = 1.0 if kind == "SGDScheduleFree" else 3e-3
    optimizer = getattr(schedulefree, kind)(_trainable(model), lr=rate, weight_decay=1e-4 / rate)
    projector.attach(optimizer)
    bound = FP32 if dtype is torch.float32 else BF16
    for _ in range(2):  # from eval mode back to training
        optimizer.train()
        _train(model, [optimizer], STEPS // 2)
        assert max(projector.residual().values()) <= bound
        optimizer.eval()
        assert max(projector.residual().values()) <= bound
    assert _moved(model, start) > 1e-2


def test_schedulefrees_wrapper_is_refused_by_name():
    """No torch optimizer, and it steps z in the weights' place."""
    schedulefree = pytest.importorskip("schedulefree")
    model = _net()
    wrapper = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(_trainable(model), lr=0.1))
    with pytest.raises(InputError, match="ScheduleFreeWrapper"):
        GraspProjector(model, BASIS).attach(wrapper)


# -- sharded: those that step shards at all


def _sharded(cases: Sequence[tuple[str, str]]) -> dict[tuple[str, str, str], list[float]]:
    """{(sharding, optimizer, method): the largest residuals, in evaluation mode too}."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    found = {}
    with torch.compiler.set_stance("force_eager"):
        for sharding, name in cases:
            for method in ("full", "lora"):
                model = _net(method)
                if sharding == "fsdp1":
                    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
                else:
                    fully_shard(model)
                projector = GraspProjector(model, BASIS)
                optimizer = SHARDED[name](_trainable(model))
                projector.attach(optimizer)
                if hasattr(optimizer, "train"):
                    optimizer.train()
                _train(model, [optimizer], 30)
                residuals = [max(projector.residual().values())]
                if hasattr(optimizer, "eval"):
                    optimizer.eval()
                    residuals.append(max(projector.residual().values()))
                found[sharding, name, method] = residuals
    return found


SHARDED = {
    "schedule-free": _from("schedulefree", "AdamWScheduleFree", lr=3e-3, weight_decay=0.1),
    **{name: OPTIMIZERS[name] for name in ("muon", "adafactor", "adamw-8bit-torchao", "adamw-8bit-bitsandbytes")},
}
PACKAGES = {
    "schedule-free": "schedulefree",
    "adamw-8bit-torchao": "torchao",
    "adamw-8bit-bitsandbytes": "bitsandbytes",
}
CASES = [
    ("fsdp2", "muon"),
    ("fsdp2", "adamw-8bit-torchao"),
    ("fsdp2", "schedule-free"),
    ("fsdp1", "adafactor"),
    ("fsdp1", "adamw-8bit-bitsandbytes"),
    ("fsdp1", "schedule-free"),
]


@pytest.fixture(scope="module")
def sharded():
    installed = [case for case in CASES if find_spec(PACKAGES.get(case[1], "torch")) is not None]
    return run_distributed(_sharded, 2, installed)[0]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("sharding", "name"), CASES)
def test_pinned_on_two_ranks(sharded, sharding, name, method):
    if (sharding, name, method) not in sharded:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    residuals = sharded[sharding, name, method]
    assert len(residuals) == (2 if name == "schedule-free" else 1)
    assert 0 < max(residuals) <= FP32


# -- several optimizers, subclasses, closures


def test_muon_beside_adamw_for_what_is_not_a_matrix():
    """Muon takes matrices only; the projector is attached to the one that holds the protected weights."""
    model = _net()
    model.norm.requires_grad_(True)
    start = _snapshot(model)
    projector = GraspProjector(model, BASIS)
    muon = OPTIMIZERS["muon"]([parameter for parameter in model.parameters() if parameter.ndim == 2])
    adamw = torch.optim.AdamW(model.norm.parameters(), lr=3e-3)
    projector.attach(muon)
    _train(model, [adamw, muon])
    assert max(projector.residual().values()) <= FP32
    assert _moved(model, start) > 1e-3


def test_a_protected_bias_in_the_other_optimizer_is_refused_by_name():
    model = _net()
    model.first = nn.Linear(INTO, HIDDEN)
    projector = GraspProjector(model, BASIS)
    muon = OPTIMIZERS["muon"]([parameter for parameter in model.parameters() if parameter.ndim == 2])
    with pytest.raises(InputError, match=r"does not hold 'first\.bias'"):
        projector.attach(muon)


class Cautious(torch.optim.AdamW):
    """Moves the weights again after the step of its base class, inside which the hooks run as well."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.999)
        return result


def test_a_subclass_that_steps_its_base_class():
    model = _net()
    start = _snapshot(model)
    torch.optim.AdamW(_trainable(model))  # the first instance of a class is what puts torch's hooks into its step
    projector = GraspProjector(model, BASIS)
    optimizer = Cautious(_trainable(model), lr=3e-3, weight_decay=0.1)
    projector.attach(optimizer)
    _train(model, [optimizer])
    assert max(projector.residual().values()) <= FP32
    assert _moved(model, start) > 1e-2


@pytest.mark.parametrize(
    "make",
    [
        _torch("SGD", lr=0.5, momentum=0.9, weight_decay=1e-3),
        _torch("AdamW", lr=3e-3, weight_decay=0.1),
        _torch("LBFGS", lr=0.3, max_iter=4),
    ],
    ids=["sgd", "adamw", "lbfgs"],
)
def test_a_closure_is_pinned_too(make):
    """`step(closure)` computes its gradients after the hook that projects: only the pins hold."""
    model = _net()
    start = _snapshot(model)
    projector = GraspProjector(model, BASIS)
    optimizer = make(_trainable(model))
    projector.attach(optimizer)
    for seed in range(20):

        def closure(seed: int = seed) -> Tensor:
            optimizer.zero_grad()
            loss = _loss(model, seed)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert max(projector.residual().values()) <= FP32
    assert _moved(model, start) > 1e-3


def test_an_average_of_pinned_weights_is_pinned():
    """As `torch.optim.swa_utils` keeps them, updated after each step."""
    model = _net()
    projector = GraspProjector(model, BASIS)
    optimizer = OPTIMIZERS["adamw-foreach"](_trainable(model))
    projector.attach(optimizer)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay=0.9)
    )
    start = _snapshot(model)
    for _ in range(5):
        _train(model, [optimizer], 10)
        average.update_parameters(model)
    assert _off_by_hand(average.module, start) <= FP32
    assert _moved(average.module, start) > 1e-2
