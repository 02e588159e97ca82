"""The examples: each runs as its docstring says, and the same short run gives the same weights in all of them.

The standard is `plain_pytorch.py` in one process. What is compared is the update, W - W0, in fp32: |difference| /
|update of the standard|, Frobenius, the largest over all weights. AdamW turns rounding of a gradient into rounding of
the step: up to 3e-5 was found, 1e-4 is allowed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOLERANCE = 1e-4
NAMES = sorted(path.stem for path in EXAMPLES.glob("*_*.py"))
NEEDS = {
    "accelerate_loop": "accelerate",
    "deepspeed_loop": "deepspeed",
    "hf_trainer": "accelerate",
    "lightning_loop": "lightning",
    "torchtitan_loop": "torchtitan",
    "trl_sft": "trl",
}
Weights = dict[str, torch.Tensor]


def run_example(name: str, *arguments: str) -> Weights:
    """Run its main() here, in the layout that was asked for; the final weights, whole, named as in the base model."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    module = importlib.import_module(name)
    options = module.options().parse_args(arguments)
    model = module.main(options)
    assert layout(model) == asked_for(options)  # Accelerate falls back to DDP without a word
    return whole(model)


def asked_for(options: argparse.Namespace) -> str:
    if getattr(options, "zero", None):
        return f"ZeRO-{options.zero}"
    if not torch.distributed.is_initialized():
        return "one process"
    return {"fsdp2": "FSDP2"}.get(getattr(options, "layout", ""), "DDP")


def layout(model: torch.nn.Module) -> str:
    """What the model that a loop stepped really was."""
    from torch.distributed.tensor import DTensor

    if type(model).__name__ == "DeepSpeedEngine":
        return f"ZeRO-{model.zero_optimization_stage()}"
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return "DDP"
    return "FSDP2" if any(isinstance(parameter, DTensor) for parameter in model.parameters()) else "one process"


def whole(model: torch.nn.Module) -> Weights:
    """Every parameter, gathered from whatever layout it is in."""
    from torch.distributed.tensor import DTensor

    from grasp_dist.architecture import canonical_name

    while hasattr(model, "module"):
        model = model.module
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().clone()
        elif isinstance(value, DTensor):
            value = value.full_tensor()
        found[canonical_name(name)] = value.double().cpu().clone()
    return found


def off(found: Weights, wanted: Weights, start: Weights) -> float:
    """The largest |found - wanted| / |wanted - start|, over what the standard changed."""
    assert found.keys() == wanted.keys()
    ratios = []
    for name, weight in wanted.items():
        update = (weight - start[name]).norm()
        difference = (found[name] - weight).norm()
        ratios.append((difference / update).item() if update else difference.item())
    return max(ratios)


@cache
def start(lora: bool) -> Weights:
    common = importlib.import_module("common")
    return whole(common.load_model(common.parser("").parse_args(["--lora"] if lora else [])))


@cache
def standard(*arguments: str) -> Weights:
    """In the test's own process."""
    return run_example("plain_pytorch", *arguments)


# -- one process


UNCLIPPED = ("--clip", "0")
CLIPPED = ("--clip", "0.1")  # the gradients' norms are about 1.3
LOOPS = ("accelerate_loop", "hf_trainer", "trl_sft", "lightning_loop")


def _reference(loop: str, clip: tuple[str, ...], *, zero: bool = False) -> tuple[str, ...]:
    """The standard's arguments: transformers clips before anything else can project, unless DeepSpeed does it."""
    clips_first = clip == CLIPPED and loop in ("hf_trainer", "trl_sft") and not zero
    return (*clip, "--no-project-first") if clips_first else clip


@pytest.mark.parametrize("clip", [UNCLIPPED, CLIPPED], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("loop", LOOPS)
def test_same_weights_in_one_process(loop, clip):
    pytest.importorskip(NEEDS[loop])
    own = ("--no-lora",) if loop == "trl_sft" else ()
    assert off(run_example(loop, *clip, *own), standard(*_reference(loop, clip)), start(lora=False)) < TOLERANCE


@pytest.mark.parametrize("loop", LOOPS)
def test_same_adapter_in_one_process(loop):
    pytest.importorskip(NEEDS[loop])
    own = () if loop == "trl_sft" else ("--lora",)
    assert off(run_example(loop, *UNCLIPPED, *own), standard(*UNCLIPPED, "--lora"), start(lora=True)) < TOLERANCE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CLIPPED, UNCLIPPED),
        (CLIPPED, (*CLIPPED, "--no-project-first")),
        (UNCLIPPED, (*UNCLIPPED, "--lr", "1.02e-3")),
    ],
    ids=["clipping", "projection before clipping", "2 % of the learning rate"],
)
def test_comparison_tells_apart(one, other):
    """What differs by more than rounding lies well beyond the tolerance, even where AdamW hides most of it."""
    assert off(standard(*one), standard(*other), start(lora=False)) > 5 * TOLERANCE


@pytest.mark.slow
def test_compiled_model_gives_the_same():
    found = run_example("hf_trainer", *UNCLIPPED, "--compile", "aot_eager")
    assert off(found, standard(*UNCLIPPED), start(lora=False)) < TOLERANCE


# -- two processes


def _all_of(cases: list[tuple[str, tuple[str, ...]]]) -> dict[tuple[str, tuple[str, ...]], Weights]:
    return {case: run_example(case[0], *case[1]) for case in cases}


def _two_ranks(cases: list[tuple[str, tuple[str, ...]]]) -> dict[tuple[str, tuple[str, ...]], Weights]:
    """By case, from rank 0; the other rank must hold the same."""
    first, second = run_distributed(_all_of, 2, cases)
    for case, weights in first.items():
        assert all(torch.equal(weights[name], second[case][name]) for name in weights), case
    return first


def _check(found: dict[tuple[str, tuple[str, ...]], Weights], case: tuple[str, tuple[str, ...]], clip, *, zero) -> None:
    loop, arguments = case
    lora = "--lora" in arguments or (loop == "trl_sft" and "--no-lora" not in arguments)
    reference = _reference(loop, clip, zero=zero) + (("--lora",) if lora else ())
    assert off(found[case], standard(*reference), start(lora=lora)) < TOLERANCE


PLAIN = [
    ("plain_pytorch", (*clip, *lora, "--layout", layout))
    for layout in ("ddp", "fsdp2")
    for clip, lora in ((UNCLIPPED, ()), (CLIPPED, ()), (UNCLIPPED, ("--lora",)))
]


@pytest.fixture(scope="module")
def plain():
    return _two_ranks(PLAIN)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: "-".join(case[1]))
def test_plain_loop_on_two_ranks(plain, case):
    _check(plain, case, CLIPPED if "0.1" in case[1] else UNCLIPPED, zero=False)


def _cases(*extra: str) -> list[tuple[str, tuple[str, ...]]]:
    cases: list[tuple[str, tuple[str, ...]]] = []
    for loop in ("accelerate_loop", "hf_trainer", "trl_sft"):
        full, lora = (("--no-lora",), ()) if loop == "trl_sft" else ((), ("--lora",))
        cases += [(loop, (*clip, *full, *extra)) for clip in (UNCLIPPED, CLIPPED)]
        cases.append((loop, (*UNCLIPPED, *lora, *extra)))
    return cases


DDP = _cases()


@pytest.fixture(scope="module")
def ddp():
    pytest.importorskip("trl")
    return _two_ranks(DDP)


@pytest.mark.slow
@pytest.mark.parametrize("case", DDP, ids=lambda case: "-".join((case[0], *case[1])))
def test_same_weights_under_ddp(ddp, case):
    _check(ddp, case, CLIPPED if "0.1" in case[1] else UNCLIPPED, zero=False)


def _zero_cases(stage: str) -> list[tuple[str, tuple[str, ...]]]:
    own = [
        ("deepspeed_loop", (*clip, *lora, "--zero", stage))
        for clip in (UNCLIPPED, CLIPPED)
        for lora in ((), ("--lora",))
    ]
    return own + (_cases("--zero", stage) if stage != "1" else [])


ZERO = {stage: _zero_cases(stage) for stage in ("1", "2", "3")}


@pytest.fixture(scope="module")
def zero():
    pytest.importorskip("deepspeed")
    pytest.importorskip("trl")
    return cache(lambda stage: _two_ranks(ZERO[stage]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "case"),
    [(stage, case) for stage, cases in ZERO.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "-".join((value[0], *value[1])),
)
def test_same_weights_under_deepspeed(zero, stage, case):
    _check(zero(stage), case, CLIPPED if "0.1" in case[1] else UNCLIPPED, zero=True)


# -- as a user starts them


def _start(*command: str, again: bool = True) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    # A thread of gloo that is there when the interpreter ends aborts it now and then (torch 2.13), after the work.
    if done.returncode and "terminate called without an active exception" in done.stderr and again:
        return _start(*command, again=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short_and_say_how_to_start(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 80
    assert f"examples/{name}.py" in text.split('"""')[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_help(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert "--basis" in _start(str(EXAMPLES / f"{name}.py"), "--help")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHES = {
    "plain, one process": ("plain_pytorch", (), ()),
    "plain, torchrun, FSDP2": ("plain_pytorch", TORCHRUN, ()),
    "Accelerate, launch, DDP": (
        "accelerate_loop",
        ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        (),
    ),
    "Trainer, torchrun, DDP": ("hf_trainer", TORCHRUN, ()),
    "TRL, torchrun, DDP": ("trl_sft", TORCHRUN, ()),
    "Lightning, torchrun, DDP": ("lightning_loop", TORCHRUN, ()),
    "DeepSpeed, torchrun, ZeRO-2": ("deepspeed_loop", TORCHRUN, ("--zero", "2")),
    "Trainer, torchrun, ZeRO-3": ("hf_trainer", TORCHRUN, ("--zero", "3")),
}


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_launches(launch):
    name, launcher, arguments = launch
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if launcher and launcher[1].startswith("accelerate"):
        launcher = (*launcher, "--main_process_port", _free_port())
    output = _start(*launcher, str(EXAMPLES / f"{name}.py"), *arguments)
    assert "4 weights protected; largest residual" in output


# -- torchtitan


def _torchtitan(folder: str, steps: int) -> dict:
    """Its Trainer with its small llama3, in fp32, on the CPU: stand-ins for what needs a GPU, and for data."""
    from dataclasses import dataclass

    import torch._utils
    from torch.distributed.fsdp import FSDPModule

    torch._utils._get_available_device_type = lambda: "cpu"
    from torchtitan.components import metrics
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.distributed import utils as distributed
    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.models.llama3.config_registry import llama3_debugmodel
    from torchtitan.tools import utils

    class Monitor:
        device_name = "cpu"

        def get_peak_stats(self):
            return metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)

        def reset_peak_stats(self):
            pass

    class Tokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config, **settings):
            super().__init__()

        encode = decode = get_vocab_size = None

    Tokenizer.__abstractmethods__ = frozenset()

    class Data(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config, *, dp_rank, **settings):
            self.seed = dp_rank

        def __iter__(self):
            while True:
                rows = torch.randint(2048, (2, 17), generator=torch.Generator().manual_seed(self.seed))
                self.seed += 2
                yield {"input": rows[:, :-1]}, rows[:, 1:]

        def state_dict(self):
            return {"seed": self.seed}

        def load_state_dict(self, state):
            self.seed = state["seed"]

    def attention(self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks=None, out_transform=None, **settings):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2)

    FlexAttention.forward = attention
    metrics.build_device_memory_monitor = Monitor
    distributed.set_pg_timeouts = lambda **settings: None
    utils.get_local_device = lambda: torch.device("cpu")

    config = llama3_debugmodel()
    config.loss = CrossEntropyLoss.Config(global_vocab_size=2048)
    config.tokenizer, config.dataloader = Tokenizer.Config(), Data.Config()
    config.training.local_batch_size, config.training.seq_len, config.training.steps = 2, 16, steps
    config.training.disable_cuda_graphs, config.training.mixed_precision_param = True, "float32"
    config.parallelism.spmd_backend = "partial_dtensor"
    config.activation_checkpoint, config.validator.enable = None, False
    config.checkpoint.enable, config.checkpoint.interval = True, 2
    config.dump_folder, config.debug.seed = folder, 0

    example = importlib.import_module("torchtitan_loop")
    before: dict[str, torch.Tensor] = {}

    class Watched(example.GraspTrainer):
        def protect(self):
            for module in self.model_parts[0].modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
            super().protect()
            before.update(whole(self.model_parts[0]))

    example.GraspTrainer = Watched
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(6):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            columns = torch.linalg.qr(torch.randn(256, 3, generator=generator)).Q
            tensors[f"model.layers.{layer}.{name}.weight.write"] = columns
    trainer = example.main(example.SpuriousBasis.from_tensors(tensors), config)
    after, basis = whole(trainer.model_parts[0]), trainer.basis
    changes = {name: after[name] - before[name] for name in basis.weights}
    along = {name: (basis.tensor(name, "write").double().T @ change).norm() for name, change in changes.items()}
    return {
        "layout": layout(trainer.model_parts[0]),
        "step": trainer.step,
        "weights": basis.weights,
        "moved": min(change.norm().item() for change in changes.values()),
        "along": max((along[name] / after[name].norm()).item() for name in along),
        "residual": trainer.projector.residual(),
        "pins": {name: pin.clone() for name, pin in trainer.projector.state_dict().items()},
    }


@pytest.mark.slow
def test_torchtitan_trains_and_resumes(tmp_path):
    """The resumed run has the pins of the first, and not those of the weights that it starts from."""
    pytest.importorskip("torchtitan.trainer")
    first, _ = run_distributed(_torchtitan, 2, str(tmp_path), 4)
    again, _ = run_distributed(_torchtitan, 2, str(tmp_path), 6)
    assert (first["layout"], first["step"], again["step"]) == ("FSDP2", 4, 6)
    assert first["weights"][:2] == ("layers.0.attention.wo.weight", "layers.0.feed_forward.w2.weight")
    assert first["moved"] > 1e-3
    assert first["along"] <= 1e-6
    assert 0 < max(again["residual"].values()) <= 1e-6
    assert all(torch.equal(pin, first["pins"][name]) for name, pin in again["pins"].items())
