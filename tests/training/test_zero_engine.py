"""The DeepSpeed engine on 1 to 3 ranks against plain PyTorch, through its checkpoints, and one engine after the other.

Each world is spawned once for one set of settings, and returns every figure that the tests look at.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn

from grasp_dist.architecture import canonical_name
from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.projection import GraspProjector
from grasp_dist.training.batches import micro_batches
from grasp_dist.training.engines import Engine, build_engine, zero
from grasp_dist.training.loop import token_losses
from grasp_dist.training.lora import reset_adapter, save_adapter
from grasp_dist.training.model import load_model
from grasp_dist.training.optimizer import build_optimizer, scale_gradients, squared_norm
from grasp_dist.training.parallel import Parallel, init_parallel
from grasp_dist.training.weights import load_weights, save_model
from tests.distributed import run_distributed
from tests.training.training_cases import random_examples, save_tiny

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

# name -> strategy, method, precision, offload
SETTINGS = {
    "zero1 full fp32": ("zero1", "full", "fp32", "none"),
    "zero1 lora bf16": ("zero1", "lora", "bf16", "none"),
    "zero2 full bf16 offload": ("zero2", "full", "bf16", "optimizer"),
    "zero3 lora fp32": ("zero3", "lora", "fp32", "none"),
    "zero3 full bf16": ("zero3", "full", "bf16", "none"),
    "zero1 lora fp32 offload": ("zero1", "lora", "fp32", "optimizer"),
    "zero1 full bf16": ("zero1", "full", "bf16", "none"),
    "zero1 full bf16 offload": ("zero1", "full", "bf16", "optimizer"),
    "zero2 lora fp32": ("zero2", "lora", "fp32", "none"),
    "zero2 full fp32": ("zero2", "full", "fp32", "none"),
    "zero2 lora bf16": ("zero2", "lora", "bf16", "none"),
    "zero2 full fp32 offload": ("zero2", "full", "fp32", "optimizer"),
    "zero3 full fp32": ("zero3", "full", "fp32", "none"),
    "zero3 lora bf16": ("zero3", "lora", "bf16", "none"),
    "zero3 full fp32 offload": ("zero3", "full", "fp32", "optimizer"),
    "zero3 lora bf16 offload all": ("zero3", "lora", "bf16", "all"),
    "zero3 full bf16 offload all": ("zero3", "full", "bf16", "all"),
}
QUICK = list(SETTINGS)[:5]
STEPS, MORE = 3, 2
BATCH = 8


def _training(method: str, precision: str) -> TrainingConfig:
    """eps is large enough that AdamW heeds the gradients' scale, and does not blow their rounding up."""
    return TrainingConfig(
        method=method,
        precision=precision,
        modules="write" if method == "lora" else "everything",
        lora=LoraConfig(rank=3, alpha=6),
        batch_size=BATCH,
        micro_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        eps=1e-3,
        max_grad_norm=0.05,
        activation_checkpointing=precision == "bf16",
    )


def _load(path: str, training: TrainingConfig, parallel: Parallel, *, seed: int = 0) -> nn.Module:
    config = ModelConfig(path=path)
    return load_model(config, parallel, precision=training.precision, training=training, seed=seed).train()


def _basis() -> SpuriousBasis:
    generator = torch.Generator().manual_seed(7)
    weight = "model.layers.0.mlp.down_proj.weight"
    sides = {"write": 24, "read": 40}
    return SpuriousBasis.from_tensors(
        {f"{weight}.{side}": torch.linalg.qr(torch.randn(n, 2, generator=generator))[0] for side, n in sides.items()}
    )


@functools.cache
def _examples() -> list[Any]:
    return random_examples(8 * BATCH, seed=3)


def _batch(step: int) -> tuple[list[int], int]:
    indices = list(range(step * BATCH, (step + 1) * BATCH))
    return indices, sum(_examples()[index].num_targets for index in indices)


def _backward(engine: Engine, step: int, parallel: Parallel) -> None:
    indices, targets = _batch(step)
    ranks = {"world_rank": parallel.world_rank, "world_size": parallel.world_size}
    batches = micro_batches(_examples(), indices, size=2, **ranks)
    for number, batch in enumerate(batches, start=1):
        loss = token_losses(engine.module, batch).sum() / targets
        engine.backward(loss * parallel.world_size, last=number == len(batches))


def _step(engine: Engine, projector: GraspProjector, step: int, parallel: Parallel, limit: float) -> float:
    """As the training loop does it; the gradients' norm before clipping."""
    _backward(engine, step, parallel)
    assert projector.project_gradients()
    gradients = engine.gradients()
    norm = float(parallel.sum_(squared_norm(gradients, torch.device("cpu")))) ** 0.5
    scale_gradients(gradients, limit / norm)
    engine.step()
    return norm


def _pieces(engine: Engine) -> dict[str, tuple[int, int, Tensor]]:
    return {name: (piece.start, piece.shape[0], piece.local.clone()) for name, piece in engine.pieces().items()}


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name][2], other[name][2]) for name in one)


def _read(engine: Engine, folder: str) -> None:
    dcp.load(dict(engine.pieces()), storage_reader=dcp.HuggingFaceStorageReader(folder))
    engine.loaded()


def _forward_copies(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters as the forward pass sees them here."""
    copies = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if hasattr(parameter, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    copies[canonical_name(name)] = parameter.detach().float().clone()
            else:
                copies[canonical_name(name)] = parameter.detach().float().clone()
    return copies


def _measure(name: str, path: str, folder: Path, others: list[str]) -> dict[str, Any]:
    strategy, method, precision, offload = SETTINGS[name]
    zero._PERSISTENT = 100 if offload == "none" else 100_000  # all parameters here are smaller than the latter
    parallel = init_parallel(ParallelConfig(strategy=strategy, offload=offload))
    training = _training(method, precision)
    limit = training.max_grad_norm
    assert limit is not None
    micro = BATCH // (2 * parallel.world_size)
    seen: dict[str, Any] = {}
    model = _load(path, training, parallel)
    engine = build_engine(model, training, parallel, micro_batches=micro)
    seen["start"] = _pieces(engine)
    projector = GraspProjector(engine.projects, _basis())
    projector.attach(engine.attach_to)
    engine.loaded()  # the projector has moved LoRA's A
    seen["kind"] = type(engine.module.optimizer).__name__
    seen["shapes"] = engine.shapes()
    seen["norms"] = []
    for step in range(STEPS):
        if step == 1:
            before = _pieces(engine)
            _backward(engine, 7, parallel)
            assert projector.project_gradients()
            engine.drop_gradients()
            seen["dropped"] = _equal(before, _pieces(engine))
        seen["norms"].append(_step(engine, projector, step, parallel, limit))
    seen["trained"] = _pieces(engine)
    seen["copies"] = _forward_copies(model)
    seen["residual"] = max(projector.residual().values())
    checkpoint = folder / name.replace(" ", "-")
    if parallel.is_main:
        checkpoint.mkdir()
    parallel.barrier()
    dcp.save(dict(engine.pieces()), storage_writer=dcp.HuggingFaceStorageWriter(str(checkpoint), save_distributed=True))
    if method == "lora":
        save_adapter(model, f"{checkpoint}-saved", parallel)
    else:
        save_model(model, None, f"{checkpoint}-saved", parallel)
    for step in range(STEPS, STEPS + MORE):
        _step(engine, projector, step, parallel, limit)
    seen["continued"] = _pieces(engine)

    if precision == "fp32" and offload == "none":
        _backward(engine, 6, parallel)
        for gradient in engine.gradients():
            gradient.fill_(float("inf"))
        with pytest.raises(InputError, match="left an optimizer step out"):
            engine.step()
        seen["refused"] = _equal(seen["continued"], _pieces(engine))

    held = [weakref.ref(tensor) for tensor in engine.optimizer.state]
    hooks = len(model._forward_pre_hooks)
    projector.detach()
    engine.close()
    engine.close()
    seen["freed"] = [ref() is None for ref in held]  # although the projector is still there
    seen["left"] = [vars(module).keys() & {"pre_bwd_fn", "post_bwd_fn"} for module in model.modules()]
    seen["hooks"] = (hooks, len(model._forward_pre_hooks), len(model._forward_hooks))
    seen["dtypes"] = {str(p.dtype) for p in model.parameters() if p.requires_grad}

    # The same model once more, from another start, as a restarted detection or the next seed does it.
    if method == "lora":
        reset_adapter(model, 1, parallel)
    else:
        load_weights(model, path, parallel)
    engine = build_engine(model, training, parallel, micro_batches=micro)
    projector = GraspProjector(engine.projects, _basis())
    projector.attach(engine.attach_to)
    _step(engine, projector, 6, parallel, limit)
    seen["read"] = {}
    for other in others:
        if SETTINGS[other][1] == method and other != name:
            _read(engine, str(folder / other.replace(" ", "-")))
            seen["read"][other] = _pieces(engine)
    _read(engine, str(folder / f"plain-{method}"))
    seen["plain"] = _pieces(engine)
    _read(engine, str(checkpoint))
    seen["resumed"] = _equal(seen["trained"], _pieces(engine))
    copies = _forward_copies(model)
    seen["copies again"] = all(torch.equal(copies[key], value) for key, value in seen["copies"].items())
    for step in range(STEPS, STEPS + MORE):
        _step(engine, projector, step, parallel, limit)
    seen["resumed steps"] = _equal(seen["continued"], _pieces(engine))
    projector.detach()
    engine.close()
    return seen


def _measure_all(names: list[str], path: str, folder: str) -> dict[str, Any]:
    return {name: _measure(name, path, Path(folder), names[:index]) for index, name in enumerate(names)}


class Reference:
    """Plain PyTorch on the global batch, in one process: fp32 masters, and a copy in the precision of the compute."""

    def __init__(self, path: str, training: TrainingConfig) -> None:
        self.alone = Parallel("none", 0, 1, torch.device("cpu"))
        self.training = training
        self.masters = _load(path, training.model_copy(update={"precision": "fp32"}), self.alone)
        self.start = {name: p.detach().clone() for name, p in self._trained(self.masters).items()}
        self.compute = copy.deepcopy(self.masters)
        if training.precision == "bf16":
            for parameter in self.compute.parameters():
                parameter.data = parameter.data.bfloat16()
        self.optimizer = build_optimizer(self.masters, training)
        self.projector = GraspProjector(self.masters, _basis())
        self.projector.attach(self.optimizer)
        self._publish()

    def step(self, step: int, world_size: int) -> float:
        masters, compute = self._trained(self.masters), self._trained(self.compute)
        sums = {name: torch.zeros_like(master) for name, master in masters.items()}
        indices, targets = _batch(step)
        for rank in range(world_size):
            for batch in micro_batches(_examples(), indices, world_rank=rank, world_size=world_size, size=2):
                (token_losses(self.compute, batch).sum() / targets * world_size).backward()
                for name, parameter in compute.items():
                    sums[name] += parameter.grad.float() / world_size
                    parameter.grad = None
        for name, master in masters.items():
            master.grad = sums[name]
        assert self.projector.project_gradients()
        gradients = [master.grad for master in masters.values()]
        norm = float(squared_norm(gradients, torch.device("cpu"))) ** 0.5
        scale_gradients(gradients, self.training.max_grad_norm / norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._publish()
        return norm

    def state(self) -> dict[str, Tensor]:
        state = {}
        for name, master in self._trained(self.masters).items():
            state[f"model.{name}"] = master.detach().flatten()
            for key, value in self.optimizer.state[master].items():
                state[f"optimizer.{key}.{name}"] = value.flatten()
        return state

    @torch.no_grad()
    def _publish(self) -> None:
        for mine, master in zip(self.compute.parameters(), self.masters.parameters(), strict=True):
            mine.copy_(master)

    @staticmethod
    def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
        return {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}


@functools.cache
def _reference(path: str, method: str, precision: str, world_size: int) -> tuple[dict[str, Tensor], Any, list[float]]:
    """Where it started, its state after `STEPS` steps, and the norms."""
    reference = Reference(path, _training(method, precision))
    norms = [reference.step(step, world_size) for step in range(STEPS)]
    return reference.start, reference.state(), norms


def _join(ranks: list[dict[str, tuple[int, int, Tensor]]]) -> dict[str, Tensor]:
    """Whole flat tensors out of every rank's pieces, which must tile them, once; step counts are on every rank."""
    joined = {}
    for name, (_, numel, first) in ranks[0].items():
        whole, times = torch.zeros(numel, dtype=first.dtype), torch.zeros(numel)
        for pieces in ranks:
            start, same, local = pieces[name]
            assert same == numel
            whole[start : start + local.numel()] = local
            times[start : start + local.numel()] += 1
        assert times.eq(len(ranks) if name.startswith("optimizer.step.") else 1).all(), name
        joined[name] = whole
    return joined


def _relative(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor] | None = None) -> float:
    """|one - other| / |other - start| over all tensors together."""
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    start = start or {name: torch.zeros_like(value) for name, value in other.items()}
    size = sum(float((other[name] - start[name].flatten()).double().square().sum()) for name in other)
    return (difference / size) ** 0.5


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model directory, and checkpoints of plain engines in one process."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder / "model", num_hidden_layers=1)
    for method in ("lora", "full"):
        training = _training(method, "fp32")
        parallel = Parallel("none", 0, 1, torch.device("cpu"))
        model = _load(str(folder / "model"), training, parallel, seed=5)
        engine = build_engine(model, training, parallel, micro_batches=4)
        for step in range(4, 6):
            _backward(engine, step, parallel)
            engine.step()
        (folder / f"plain-{method}").mkdir()
        writer = dcp.HuggingFaceStorageWriter(str(folder / f"plain-{method}"), save_distributed=True)
        dcp.save(dict(engine.pieces()), storage_writer=writer, no_dist=True)
        torch.save(_pieces(engine), folder / f"plain-{method}.pt")
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, QUICK), id="world2", marks=pytest.mark.slow),
        pytest.param((2, list(SETTINGS)[5:]), id="world2-rest", marks=pytest.mark.slow),
        pytest.param((1, list(SETTINGS)), id="world1", marks=pytest.mark.slow),
        pytest.param((3, QUICK), id="world3", marks=pytest.mark.slow),
    ],
)
def measured(request, base, tmp_path_factory) -> dict[str, Any]:
    world_size, names = request.param
    folder = tmp_path_factory.mktemp("checkpoints")
    for method in ("lora", "full"):
        (folder / f"plain-{method}").symlink_to(base / f"plain-{method}")
    ranks = run_distributed(_measure_all, world_size, names, str(base / "model"), str(folder), timeout=900)
    return {
        "world_size": world_size,
        "names": names,
        "folder": folder,
        "model": str(base / "model"),
        "base": base,
        "ranks": {name: [rank[name] for rank in ranks] for name in names},
    }


def test_starts_from_the_exact_weights_and_tiles_them(measured):
    for name, ranks in measured["ranks"].items():
        _, method, precision, _ = SETTINGS[name]
        start, _, _ = _reference(measured["model"], method, precision, measured["world_size"])
        joined = _join([rank["start"] for rank in ranks])
        weights = _part(joined, "model.")
        assert weights.keys() == start.keys(), name
        assert all(torch.equal(weights[key], start[key].flatten()) for key in start), name
        assert {key: tuple(value.shape) for key, value in start.items()} == ranks[0]["shapes"], name
        assert not any(value.any() for value in _part(joined, "optimizer.").values()), name


def test_trains_as_plain_pytorch_does(measured):
    """Accumulated, projected, clipped, with weight decay, and with a step in between that was left out."""
    for name, ranks in measured["ranks"].items():
        _, method, precision, _ = SETTINGS[name]
        start, wanted, norms = _reference(measured["model"], method, precision, measured["world_size"])
        joined = _join([rank["trained"] for rank in ranks])
        # A bf16 forward pass depends on how the batch is cut over ranks.
        assert ranks[0]["norms"] == pytest.approx(norms, rel=1e-3 if "bf16" in name else 1e-5), name
        assert min(norms) > 2 * _training(method, precision).max_grad_norm, "nothing was clipped"
        weights = _relative(_part(joined, "model."), _part(wanted, "model."), start)
        # On 3 ranks DeepSpeed rounds these gradients to bf16 on the way (4.7e-3 of the updates seen).
        tolerance = 2e-2 if (name, len(ranks)) == ("zero2 full bf16 offload", 3) else 1e-5
        assert weights <= tolerance, name
        for key in ("exp_avg", "exp_avg_sq"):
            prefix = f"optimizer.{key}."
            assert _relative(_part(joined, prefix), _part(wanted, prefix)) <= tolerance, (name, key)
        assert set(map(float, _part(joined, "optimizer.step.").values())) == {STEPS}, name


def test_leaves_a_step_out_without_trace(measured):
    assert all(rank["dropped"] for ranks in measured["ranks"].values() for rank in ranks)


def test_says_when_deepspeed_leaves_a_step_out(measured):
    refused = {name: [rank["refused"] for rank in ranks]
               for name, ranks in measured["ranks"].items() if "refused" in ranks[0]}  # fmt: skip
    assert refused
    assert all(all(ranks) for ranks in refused.values())


def test_without_deepspeed_says_what_to_install(base, monkeypatch):
    training, parallel = _training("lora", "fp32"), Parallel("zero2", 0, 1, torch.device("cpu"))
    model = nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"grasp-dist\[deepspeed\]"):
        build_engine(model, training, parallel, micro_batches=1)
    old = types.ModuleType("deepspeed")
    old.__version__ = "0.18.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", old)
    with pytest.raises(InputError, match=r"0\.19\.4 or newer"):
        build_engine(model, training, parallel, micro_batches=1)


def test_residual_is_zero_to_rounding(measured):
    for name, ranks in measured["ranks"].items():
        assert all(rank["residual"] <= 1e-6 for rank in ranks), name


def test_forward_copies_are_the_rounded_masters_on_every_rank(measured):
    for name, ranks in measured["ranks"].items():
        masters = _part(_join([rank["trained"] for rank in ranks]), "model.")
        for rank in ranks:
            for key, copied in rank["copies"].items():
                wanted = masters[key].bfloat16().float() if SETTINGS[name][2] == "bf16" else masters[key]
                assert torch.equal(copied.flatten(), wanted), (name, key)


def test_continues_from_its_own_checkpoint_bit_for_bit(measured):
    for name, ranks in measured["ranks"].items():
        for what in ("resumed", "copies again", "resumed steps"):
            assert all(rank[what] for rank in ranks), (name, what)


def test_reads_checkpoints_of_other_stages_and_of_one_process(measured):
    for name, ranks in measured["ranks"].items():
        for other in ranks[0]["read"]:
            found = _join([rank["read"][other] for rank in ranks])
            wanted = _join([rank["trained"] for rank in measured["ranks"][other]])
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), (name, other)
        plain = torch.load(measured["base"] / f"plain-{SETTINGS[name][1]}.pt")
        found = _join([rank["plain"] for rank in ranks])
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], plain[key][2]) for key in plain), name
    assert any(rank["read"] for ranks in measured["ranks"].values() for rank in ranks)


def test_its_checkpoints_are_read_by_one_process_without_deepspeed(measured):
    parallel = Parallel("none", 0, 1, torch.device("cpu"))
    for name, ranks in measured["ranks"].items():
        training = _training(SETTINGS[name][1], "fp32")
        engine = build_engine(_load(measured["model"], training, parallel), training, parallel, micro_batches=1)
        reader = dcp.HuggingFaceStorageReader(str(measured["folder"] / name.replace(" ", "-")))
        dcp.load(dict(engine.pieces()), storage_reader=reader, no_dist=True)
        wanted = _join([rank["trained"] for rank in ranks])
        assert all(torch.equal(piece.local, wanted[key]) for key, piece in engine.pieces().items()), name


def test_saves_fp32_masters_as_an_ordinary_directory(measured):
    for name, ranks in measured["ranks"].items():
        masters = _part(_join([rank["trained"] for rank in ranks]), "model.")
        lora = SETTINGS[name][1] == "lora"
        folder = measured["folder"] / f"{name.replace(' ', '-')}-saved"
        saved = load_file(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
        if lora:
            saved = {key.removeprefix("base_model.model.").replace("weight", "default.weight"): value
                     for key, value in saved.items()}  # fmt: skip
        assert saved.keys() == masters.keys(), name
        assert all(torch.equal(saved[key].flatten(), masters[key]) for key in saved), name


def test_close_frees_the_engine_and_restores_the_model(measured):
    for name, ranks in measured["ranks"].items():
        for rank in ranks:
            assert rank["freed"], name
            assert all(rank["freed"]), name
            assert not any(rank["left"]), name
            assert rank["hooks"][0] > 0, name
            assert rank["hooks"][1:] == (0, 0), name
            assert rank["dtypes"] == {"torch.float32"}, name


def test_every_way_in_which_zero_stores_its_state_is_among_the_settings(measured):
    kinds = {name: ranks[0]["kind"] for name, ranks in measured["ranks"].items()}
    wanted = {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"}
    assert set(kinds.values()) == wanted, kinds
