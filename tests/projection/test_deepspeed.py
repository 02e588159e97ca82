"""The DeepSpeed adapter on 1 to 3 ranks: where the numbers are, when the hooks come, and what training comes to.

Each world is spawned once for one set of settings, and returns every figure that the tests look at.
"""

from __future__ import annotations

import collections
import itertools
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from grasp_dist.errors import InputError, NonFiniteError
from grasp_dist.projection import GraspProjector
from grasp_dist.projection.adapters.deepspeed import Zero, is_deepspeed
from tests.distributed import run_distributed
from tests.projection.flat_cases import (
    Odd,
    check_tiles,
    inputs_of,
    join,
    make_model,
    measure,
    odd_basis,
    train_reference,
)
from tests.projection.projection_cases import Watch, relative_error
from tests.projection.zero_cases import (
    QUICK,
    SETTINGS,
    UNCHECKED,
    backward,
    configuration,
    dtype_of,
    make_engine,
    prepare,
)

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

DECAY = 0.1
REST = [name for name in SETTINGS if name not in QUICK]


def slow_param(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, list[Any]]:
    """What is measured on two ranks, all in one spawn: {what: by rank}."""
    ranks = run_distributed(_on_two_ranks, 2, str(tmp_path_factory.mktemp("checkpoints")))
    return {what: [rank[what] for rank in ranks] for what in ranks[0]}


def _on_two_ranks(folder: str) -> dict[str, Any]:
    return {
        "looks": _look(list(SETTINGS)),
        "trained": _train_all(CASES),
        "long": _long_run(LONG),
        "left out": _left_out(),
        "checkpoints": _through_a_checkpoint(folder),
        "beside nccl": _beside_nccl(),
        "refusals": _refusals(),
    }


def _tolerance(name: str) -> float:
    return {"fp32": 1e-6, "bf16": 8e-3, "fp16": 1e-3}[SETTINGS[name].get("dtype", "fp32")]


# -- fragments and hooks


def _look_at(name: str) -> dict[str, Any]:
    model, settings = Odd(), SETTINGS[name]
    micro_steps = settings.get("accumulate", 1)
    engines: list[Any] = []

    def start() -> tuple[Zero, Any]:
        engines.append(make_engine(model, settings))
        return Zero(model), engines[0]

    seen = measure(
        model,
        start,
        forward=lambda inputs: engines[0](inputs),
        backward=lambda: backward(engines[0], micro_steps),
        step=lambda: engines[0].step(),
        micro_steps=micro_steps,
        dtype=dtype_of(settings),
    )
    seen["recognised"] = [is_deepspeed(model), is_deepspeed(engines[0]), is_deepspeed(torch.nn.Linear(1, 1))]
    return seen


def _look(names: list[str]) -> dict[str, dict[str, Any]]:
    prepare()
    return {name: _look_at(name) for name in names}


@pytest.fixture(
    scope="module",
    params=[(1, QUICK), (2, list(SETTINGS)), (3, QUICK), slow_param((1, REST)), slow_param((3, REST))],
    ids=["world1", "world2", "world3", "world1-rest", "world3-rest"],
)
def looks(request):
    """(ranks, {name of the setting: what each rank saw})."""
    world_size, names = request.param
    ranks = (
        request.getfixturevalue("two_ranks")["looks"] if world_size == 2 else run_distributed(_look, world_size, names)
    )
    return world_size, {name: [rank[name] for rank in ranks] for name in names}


def test_intervals_tile_every_parameter_with_the_same_cuts_on_all_ranks(looks):
    world_size, settings = looks
    for name, ranks in settings.items():
        check_tiles(ranks)
        alone = name == "stage0" or world_size == 1
        assert ranks[0]["groups"] == {(None if alone else world_size, None if world_size == 1 else world_size)}, name


def test_fragments_hold_the_whole_weight_and_its_gradient(looks):
    for name, (seen, *_) in looks[1].items():
        assert seen["weight"] == 0, name
        assert seen["like"] == 0, name
        assert seen["gradient"] <= _tolerance(name), name
        if name != "bf16-optimizer-clipped":  # there the hook comes after clipping
            scale = 256 if "fp16" in name else 1
            assert seen["scale"] == pytest.approx(scale, rel=_tolerance(name)), name


def test_hooks_come_once_before_and_once_for_every_unit(looks):
    for name, (seen, *_) in looks[1].items():
        units = {layout[3] for layout in seen["layout"].values()}
        assert seen["calls"] == ["before", *sorted(units)], name
        assert (len(units) > 1) == ("groups" in name or "sub_group_size" in SETTINGS[name]), name
        assert seen["calls after removal"] == 0, name
        assert seen["recognised"] == [True, True, False], name


def test_what_is_written_is_what_the_optimizer_steps_and_the_model_uses(looks):
    for name, (seen, *_) in looks[1].items():
        assert seen["step"] <= max(_tolerance(name), 1e-5 if "clip" in SETTINGS[name] else 0), name
        assert seen["shift"] <= 1e-6, name
        assert seen["used"] <= 5 * _tolerance(name), name
        assert seen["published"] <= 5 * _tolerance(name), name


def test_the_norm_to_clip_by_is_that_after_the_projection_where_zero_allows_it(looks):
    for name, (seen, *_) in looks[1].items():
        if "clip" in SETTINGS[name]:
            before, after, step = seen["norms"]
            assert after < 0.98 * before, name
            assert step == pytest.approx(after / before if name == "bf16-optimizer-clipped" else 1.0, rel=5e-3), name


def test_whole_copies_are_named_where_the_forward_pass_reads_them(looks):
    for name, (seen, *_) in looks[1].items():
        held = SETTINGS[name]["stage"] in (1, 2) or name == "stage3-persistent"
        assert seen["copies"] == ([(11, 13)] if held else []), name


# -- training


def _train(name: str, kind: str, side: str, *, pinned: bool) -> dict[str, Any]:
    """Two steps of SGD against the reference."""
    model, basis = make_model(kind), odd_basis(side)
    wanted = train_reference(model, basis, 2, pinned=pinned, decay=DECAY)
    engine = make_engine(model, SETTINGS[name], weight_decay=DECAY)
    projector = GraspProjector(model if pinned else engine, basis, pin=pinned)
    projector.attach(engine)
    counts = []
    for step in range(2):
        engine.backward(engine(inputs_of(dist.get_rank(), step, dtype_of(SETTINGS[name]))))
        with Watch() as watch:
            engine.step()
        counts.append(collections.Counter(kind for kind, _ in watch.collectives))
    residual = projector.residual()
    projector.detach()
    engine.backward(engine(inputs_of(dist.get_rank(), 0, dtype_of(SETTINGS[name]))))
    zero = Zero(engine)
    fragments = {key: zero.fragment(key, p) for key, p in model.named_parameters() if p.requires_grad}
    found = join(fragments, lambda fragment: fragment.storage.weight())
    with Watch() as watch:
        engine.step()
    return {
        "error": max(relative_error(found[key], wanted[key]) for key in wanted),
        "residual": max(residual.values()),
        "steps": projector.steps,
        "units": len({fragment.unit for fragment in fragments.values()}),
        "own": counts[1] - collections.Counter(kind for kind, _ in watch.collectives),
    }


TRAINED = ["stage0", "stage1", "stage2", "stage2-groups", "stage2-offload", "stage3", "stage3-offload-all"]
CASES = [
    *itertools.product(TRAINED, ("full", "lora"), ("write", "read", "both"), (True,)),
    *itertools.product(TRAINED, ("full", "lora"), ("both",), (False,)),
    ("stage3-sub-groups", "full", "both", True),
    ("stage2-bf16", "full", "both", True),
    ("stage3-bf16", "lora", "both", True),
    ("bf16-optimizer", "full", "both", True),
]
CUT_CASES = [("stage1", "lora", "both", True), ("stage2", "lora", "write", True)]
"""On three ranks a row of a lora_A is cut, and one rank holds nothing of what is cut."""
MORE_CASES = [
    case
    for case in itertools.product(SETTINGS, ("full", "lora"), ("write", "read", "both"), (True, False))
    if case not in CASES and "accumulate" not in SETTINGS[case[0]] and "clip" not in SETTINGS[case[0]]
]


def _train_all(cases: list[tuple[str, str, str, bool]]) -> dict[tuple[str, str, str, bool], dict[str, Any]]:
    prepare()
    return {(name, kind, side, pin): _train(name, kind, side, pinned=pin) for name, kind, side, pin in cases}


@pytest.fixture(
    scope="module",
    params=[(2, CASES), (3, CUT_CASES), slow_param((2, MORE_CASES)), slow_param((3, CASES))],
    ids=["world2", "world3-cut", "world2-more", "world3"],
)
def trained(request):
    world_size, cases = request.param
    if cases is CASES and world_size == 2:
        return request.getfixturevalue("two_ranks")["trained"][0]
    return run_distributed(_train_all, world_size, cases, timeout=1200)[0]


def test_steps_are_those_of_the_reference(trained):
    for case, seen in trained.items():
        rounding = SETTINGS[case[0]].get("dtype", "fp32")
        assert seen["error"] <= {"fp32": 1e-5, "bf16": 5e-2, "fp16": 5e-3}[rounding], case
        assert seen["steps"] == 2, case


def test_masters_stay_on_their_pins_to_fp32_rounding_whatever_the_models_dtype(trained):
    for case, seen in trained.items():
        if case[3]:
            assert seen["residual"] <= 1e-6, case
        elif case[1] == "full":  # decay leaves LoRA's pins, which are zero, alone
            assert seen["residual"] > 1e-6, case


def test_a_pass_is_at_most_one_all_reduce_and_nothing_is_gathered(trained):
    for case, seen in trained.items():
        if SETTINGS[case[0]].get("dtype") == "fp16":
            continue  # the step to compare with may be one that the loss scale leaves out
        passes = 1 + (seen["units"] if case[3] else 0)
        assert set(seen["own"]) <= {"allreduce_"}, case
        assert seen["own"]["allreduce_"] <= passes, case
        assert case[0] == "stage0" or seen["own"]["allreduce_"] > 0, case


LONG = [("stage2-bf16", "full"), ("stage3-bf16-offload", "full"), ("bf16-optimizer", "lora"), ("stage1", "lora")]
LONGER = [("stage2-fp16", "full"), ("stage3", "full"), ("stage3-fp16", "lora"), ("stage2-offload", "full")]


def _long_run(cases: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[float, int]]:
    prepare()
    result = {}
    for name, kind in cases:
        model = make_model(kind)
        engine = make_engine(model, SETTINGS[name], torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        projector = GraspProjector(engine, odd_basis("both"))
        projector.attach(engine)
        for step in range(100):
            engine.backward(engine(inputs_of(dist.get_rank(), step, dtype_of(SETTINGS[name]))))
            engine.step()
        result[name, kind] = max(projector.residual().values()), projector.steps
    return result


def _check_long(runs: dict[tuple[str, str], tuple[float, int]]) -> None:
    for case, (residual, steps) in runs.items():
        assert residual <= 1e-6, case
        assert steps == 100, case


def test_residual_after_a_hundred_steps_of_adamw(two_ranks):
    _check_long(two_ranks["long"][0])


@pytest.mark.slow
def test_residual_after_a_hundred_steps_of_adamw_in_more_settings():
    _check_long(run_distributed(_long_run, 2, LONGER)[0])


# -- steps that are left out, checkpoints


SKIPPING = ["stage1", "stage2-bf16", "stage2-fp16", "stage2-offload", "bf16-optimizer", "stage3", "stage3-bf16-offload"]
RAISING = ["stage0", "unchecked"]


def _left_out() -> dict[str, Any]:
    """A step with a NaN on one rank, and one without; {setting: (the master moved, steps seen) after each}."""
    result = {}
    for name in SKIPPING + RAISING:
        model, settings = make_model("full"), SETTINGS.get(name, UNCHECKED)
        engine = make_engine(model, settings)
        projector = GraspProjector(engine, odd_basis("both"))
        projector.attach(engine)
        master = Zero(model).fragment("wide.weight", model.wide.weight).storage.weight
        start, seen = master().clone(), []
        for nan in (True, False):
            inputs = inputs_of(dist.get_rank(), 0, dtype_of(settings))
            if nan and dist.get_rank() == dist.get_world_size() - 1:
                inputs[0, 0] = torch.nan
            engine.backward(engine(inputs))
            try:
                engine.step()
            except NonFiniteError as error:
                seen.append(str(error))
            else:
                seen.append((not torch.equal(master(), start), projector.steps))
        result[name] = seen
    return result


def test_a_step_with_a_nan_is_deepspeeds_to_leave_out_or_an_error_on_all_ranks(two_ranks):
    for seen in two_ranks["left out"]:
        for name in SKIPPING:
            assert seen[name] == [(False, 0), (True, 1)], name
        for name in RAISING:
            assert "NaN or infinite on some rank" in seen[name][0], name


def _through_a_checkpoint(folder: str) -> dict[str, Any]:
    prepare()
    result = {}
    for name in ("stage1", "stage2-bf16", "stage3-bf16", "stage3-sub-groups"):
        model = make_model("full")
        engine = make_engine(model, SETTINGS[name], torch.optim.AdamW)
        projector = GraspProjector(engine, odd_basis("both"))
        projector.attach(engine)

        def step(engine: Any = engine, name: str = name) -> None:
            engine.backward(engine(inputs_of(dist.get_rank(), 0, dtype_of(SETTINGS[name]))))
            engine.step()

        step()
        engine.save_checkpoint(f"{folder}/{name}")
        step()
        engine.load_checkpoint(f"{folder}/{name}")
        loaded = max(projector.residual().values())
        step()
        result[name] = loaded, max(projector.residual().values()), projector.steps
    return result


def test_hooks_and_fragments_survive_load_checkpoint(two_ranks):
    for name, (loaded, after, steps) in two_ranks["checkpoints"][0].items():
        assert loaded <= 1e-6, name
        assert after <= 1e-6, name
        assert steps == 3, name


def _beside_nccl() -> tuple[bool, int, float]:
    """Masters on the CPU of ranks whose group, as with NCCL, sums nothing there."""
    engine = make_engine(make_model("full"), SETTINGS["stage3-bf16-offload"])
    with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        fragment = Zero(engine).fragment("wide.weight", engine.module.wide.weight)
        projector = GraspProjector(engine, odd_basis("both"))
        projector.attach(engine)
        engine.backward(engine(inputs_of(dist.get_rank(), 0, torch.bfloat16)))
        engine.step()
        residual = max(projector.residual().values())
    assert fragment.group is not None
    return fragment.group is engine.optimizer.dp_process_group, fragment.group.size(), residual


def test_masters_on_the_cpu_are_summed_over_a_group_that_reaches_them(two_ranks):
    same, size, residual = two_ranks["beside nccl"][0]
    assert (same, size) == (False, 2)
    assert residual <= 1e-6


# -- what is accepted, and refused by name


def _message(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except InputError as error:
        return str(error)
    return ""


def _of_class(name: str, *bases: type) -> Any:
    kind = type(name, bases, {"__init__": lambda self: None})
    return kind()


def _refusals() -> dict[str, str]:
    prepare()
    import deepspeed
    from accelerate import Accelerator
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, though the group exists already
    Accelerator(cpu=True)  # the wrapper wants its state

    messages: dict[str, str] = {}
    model = make_model("full")
    left_out = model.single.bias
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad and p is not left_out])
    engine, *_ = deepspeed.initialize(model=model, optimizer=inner, config=configuration(stage=2))
    other = make_engine(make_model("full"), SETTINGS["stage2"])
    zero = Zero(model)
    for optimizer in (engine, engine.optimizer, DeepSpeedOptimizerWrapper(engine.optimizer)):
        messages[f"accepted: {type(optimizer).__name__}"] = _message(zero.owned, optimizer)
    for name, optimizer in (("the torch optimizer", inner), ("another engine", other), ("a string", "adam")):
        messages[name] = _message(zero.hook, optimizer, lambda: None, lambda unit: None)
    messages["left out"] = _message(zero.fragment, "single.bias", left_out)
    messages["frozen"] = _message(zero.fragment, "entry.weight", model.entry.weight)
    messages["not the engine's module"] = _message(Zero, torch.nn.Sequential(model))

    for attribute, value in (
        ("zero_hpz_partition_size", 2),
        ("zenflow", True),
        ("swap_optimizer", True),
        ("params_in_nvme_and_cpu", True),
        ("torch_autocast_gradscaler", object()),
        ("model_parallel_world_size", 2),
        ("optimizer", _of_class("OnebitAdam", torch.optim.Optimizer)),
    ):
        engine = make_engine(make_model("full"), SETTINGS["stage2"])
        setattr(engine.optimizer, attribute, value)
        messages[attribute] = _message(Zero, engine)
    swapping = make_engine(make_model("full"), SETTINGS["stage2"])
    swapping.optimizer.optimizer.train = swapping.optimizer.optimizer.eval = lambda: None
    messages["schedule-free"] = _message(Zero, swapping)
    engine.optimizer.optimizer = _of_class("Homemade")
    messages["no hooks"] = _message(Zero, engine)
    for name in ("SuperOffloadOptimizer_Stage3", "MiCS_Optimizer", "ZenFlowZeroOptimizerSequential", "FP16_Optimizer"):
        engine.optimizer = _of_class(name)
        messages[name] = _message(Zero, engine)
    engine.optimizer = None
    messages["no optimizer"] = _message(Zero, engine)
    messages["bf16 without ZeRO"] = _message(Zero, make_engine(make_model("full"), {"stage": 0, "dtype": "bf16"}))

    clipped = make_engine(make_model("full"), SETTINGS["bf16-optimizer-clipped"])
    projector = GraspProjector(clipped, odd_basis("both"))
    projector.attach(clipped)
    clipped.backward(clipped(inputs_of(dist.get_rank(), 0, torch.bfloat16)))
    messages["projected before clipping"] = _message(projector.project_gradients)
    clipped.step()
    messages["accepted: projected by the hook"] = "" if projector.steps == 1 else "no step"
    return messages


def test_refusals_name_what_and_the_remedy(two_ranks):
    messages, others = two_ranks["refusals"]
    assert messages.keys() == others.keys()
    wanted = {
        "the torch optimizer": "AdamW is not what steps the model: the DeepSpeedZeroOptimizer of its DeepSpeed engine",
        "another engine": "pass the engine that deepspeed.initialize returned",
        "a string": "this str is not what steps the model",
        "left out": "'single.bias' is not among the parameters of the optimizer",
        "frozen": "'entry.weight' is not among the parameters of the optimizer",
        "not the engine's module": "cannot find the DeepSpeed engine of this Sequential",
        "zero_hpz_partition_size": '"zero_hpz_partition_size": 1',
        "zenflow": 'remove "zenflow"',
        "swap_optimizer": "NVMe",
        "params_in_nvme_and_cpu": "NVMe",
        "torch_autocast_gradscaler": "torch_autocast in fp16",
        "model_parallel_world_size": "tensor parallelism",
        "optimizer": "OnebitAdam: 1-bit optimizers",
        "schedule-free": "SGD puts other weights in place for evaluation",
        "no hooks": "Homemade does not run the step hooks",
        "SuperOffloadOptimizer_Stage3": 'remove "super_offload"',
        "MiCS_Optimizer": "MiCS is not supported",
        "ZenFlowZeroOptimizerSequential": 'remove "zenflow"',
        "FP16_Optimizer": '"zero_optimization": {"stage": 1}',
        "no optimizer": "was given no optimizer",
        "bf16 without ZeRO": '"zero_optimization": {"stage": 1}',
        "projected before clipping": "do not call project_gradients",
    }
    for name, message in messages.items():
        if name.startswith("accepted: "):
            assert message == "", name
        else:
            assert wanted[name] in message, name
    assert {name for name in messages if not name.startswith("accepted: ")} == set(wanted)


# -- DeepSpeed's own optimizers, which are compiled at first use


OWN = {
    "CPU Adam": ("DeepSpeedCPUAdam", {"stage": 2, "offload": True}),
    "partly offloaded": ("DeepSpeedCPUAdam", {"stage": 3, "offload": True, "ratio": 0.5, "sub_group_size": 20}),
    "fused Adam": ("FusedAdam", {"stage": 2}),
}
BUILD = """
import sys, torch
from deepspeed.ops import adam
getattr(adam, sys.argv[1])([torch.nn.Parameter(torch.ones(2))])
"""


def _cannot_build(kind: str) -> str:
    """Compile the kernel of an optimizer, which takes minutes, before ranks wait for each other: "", or why not."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else f"{kind}: {done.stderr[-300:]}"


def _own_optimizers(built: list[str]) -> dict[str, Any]:
    prepare()
    from deepspeed.ops import adam

    kinds = {name: (getattr(adam, OWN[name][0]), OWN[name][1]) for name in built}
    kinds["Adagrad, which ZeRO makes anew"] = (torch.optim.Adagrad, {"stage": 3, "sub_group_size": 40})
    result = {}
    for name, (kind, settings) in kinds.items():
        engine = make_engine(make_model("full"), settings, kind)
        projector = GraspProjector(engine, odd_basis("both"))
        projector.attach(engine)
        for step in range(10):
            engine.backward(engine(inputs_of(dist.get_rank(), step, torch.float32)))
            engine.step()
        result[name] = max(projector.residual().values()), projector.steps
    return result


@pytest.mark.slow
def test_deepspeeds_own_optimizers_and_partial_offload():
    unbuilt = {kind: why for kind in sorted({kind for kind, _ in OWN.values()}) if (why := _cannot_build(kind))}
    built = [name for name, (kind, _) in OWN.items() if kind not in unbuilt]
    results = run_distributed(_own_optimizers, 2, built)[0]
    assert results.keys() == {*built, "Adagrad, which ZeRO makes anew"}
    for name, (residual, steps) in results.items():
        assert residual <= 1e-6, name
        assert steps == 10, name
    if unbuilt:
        pytest.skip(f"cannot be compiled here: {unbuilt}")
