"""Real checkpoints of real trainings on two ranks, by DeepSpeed and torch.distributed.checkpoint, and what is in them.

Every training starts from `tiny_model("llama")`, whose directory is `<root>/base`. Beside each checkpoint stands
`<name>.oracle.safetensors`: what the engine itself says that its trained parameters are, fp32, by the base model's
names.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.distributed import run_distributed
from tests.tiny_models import tiny_model

__all__ = ["ALPHA", "RANK", "dense_updates", "made", "oracle", "universal"]

RANK, ALPHA = 4, 6
TARGETS = ["o_proj", "down_proj"]

# name -> what it changes in DeepSpeed's configuration; "full": no LoRA, "exclude": frozen parameters are not saved,
# "odd": a model of odd sizes instead, which ranks cannot share evenly.
QUICK: dict[str, dict[str, Any]] = {
    "zero2-bf16-excluded": {"stage": 2, "dtype": "bf16", "exclude": True},
    "zero3": {"stage": 3, "sub_group_size": 300},
    "zero1-full-bf16": {"stage": 1, "dtype": "bf16", "full": True, "groups": True},
    "odd-zero3": {"stage": 3, "odd": True},
    "odd-zero2-aligned": {"stage": 2, "dtype": "bf16", "parameter_alignment": True, "odd": True, "groups": True},
}
SLOW: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1, "groups": True},
    "zero1-bf16-optimizer": {"stage": 1, "dtype": "bf16", "accumulate_in": "fp32"},
    "zero1-fp16": {"stage": 1, "dtype": "fp16"},
    "zero2": {"stage": 2, "round_robin_gradients": True},
    "zero2-aligned": {"stage": 2, "dtype": "bf16", "parameter_alignment": True, "rank": 3},
    "zero2-offload": {"stage": 2, "offload": True},
    "zero3-bf16-excluded": {"stage": 3, "dtype": "bf16", "exclude": True, "groups": True},
    "zero3-fp16": {"stage": 3, "dtype": "fp16"},
    "zero0-full": {"stage": 0, "full": True},
    "zero2-full": {"stage": 2, "full": True, "groups": True},
    "zero3-full": {"stage": 3, "full": True, "sub_group_size": 1500},
    "zero3-full-bf16": {"stage": 3, "full": True, "dtype": "bf16"},
}
DISTRIBUTED = ("dcp-app", "dcp-lora", "dcp-safetensors", "dcp-consolidated", "dcp-full", "own", "own-full")


def made(which: str = "quick") -> Path:
    """The folder of the checkpoints: "quick" by two ranks, "slow" by two (DeepSpeed) and three (torch). Made once."""
    return _made(which)


@functools.cache
def _made(which: str) -> Path:
    root = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    atexit.register(shutil.rmtree, root, True)
    tiny_model("llama").save_pretrained(root / "base")
    if which == "quick":
        run_distributed(_train_all, 2, str(root), QUICK)
    else:
        run_distributed(_train_deepspeed, 2, str(root), SLOW)
        run_distributed(_train_torch, 3, str(root))
    return root


def universal(checkpoint: Path) -> Path:
    """DeepSpeed's own conversion of a checkpoint, beside it."""
    tag = checkpoint / (checkpoint / "latest").read_text()
    out = checkpoint.with_name(f"{checkpoint.name}-universal")
    if not out.is_dir():
        options = ["--num_extract_workers=1", "--num_merge_workers=1", "--inject_missing_state"]
        done = subprocess.run(
            [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options,
             "--input_folder", tag, "--output_folder", out / tag.name],
            env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return out


def oracle(checkpoint: Path) -> dict[str, torch.Tensor]:
    """{base model's name: trained parameter, fp32}, as the engine had it."""
    return load_file(checkpoint.with_name(f"{checkpoint.name}.oracle.safetensors"))


def dense_updates(checkpoint: Path, base: Path, rounded_to: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """{weight: what was added to it, fp64}: s B A, or tuned - base where the weights themselves were trained."""
    trained = {name: tensor.double() for name, tensor in oracle(checkpoint).items()}
    factors = [name for name in trained if ".lora_A." in name]
    if factors:
        rank = trained[factors[0]].shape[0]
        return {
            f"{name.partition('.lora_A.')[0]}.weight": ALPHA
            / rank
            * trained[name.replace("lora_A", "lora_B")]
            @ trained[name]
            for name in factors
        }
    start = load_file(base / "model.safetensors")
    start = {name: tensor.to(rounded_to or tensor.dtype).double() for name, tensor in start.items()}
    return {name: trained[name] - start[name] for name in trained}


def _train_all(root: str, settings: dict[str, dict[str, Any]]) -> None:
    _train_torch(root)
    _train_deepspeed(root, settings)


def _model(full: bool, rank: int = RANK) -> Any:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    if not full:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=TARGETS))
    return model


def _batch() -> torch.Tensor:
    return torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(dist.get_rank()))


def _save_oracle(folder: Path, trained: dict[str, torch.Tensor]) -> None:
    from grasp_dist.architecture import canonical_name

    if dist.get_rank() == 0:
        tensors = {canonical_name(name): tensor.detach().float().clone() for name, tensor in trained.items()}
        save_file(tensors, folder.with_name(f"{folder.name}.oracle.safetensors"))


def _train_deepspeed(root: str, settings: dict[str, dict[str, Any]]) -> None:
    from tests.projection.flat_cases import Odd, inputs_of
    from tests.projection.zero_cases import configuration, prepare

    prepare()
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for name, changes in settings.items():
        changes = dict(changes)
        full, exclude, groups, odd = (changes.pop(key, False) for key in ("full", "exclude", "groups", "odd"))
        model = Odd() if odd else _model(full, changes.pop("rank", RANK))
        if full:
            model.model.embed_tokens.weight.requires_grad_(False)
            model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(changes.get("dtype", ""), torch.float32)
        model = model.to(dtype)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts: Any = (
            [{"params": trainable[::3]}, {"params": trainable[1::3] + trainable[2::3]}] if groups else trainable
        )
        optimizer = torch.optim.AdamW(parts, lr=1e-2, weight_decay=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration(**changes))
        for _ in range(3):
            loss = engine(inputs_of(dist.get_rank(), 0, dtype)) if odd else None
            engine.backward(engine(input_ids=_batch(), labels=_batch()).loss if loss is None else loss)
            engine.step()
        folder = Path(root, name)
        engine.save_checkpoint(str(folder), exclude_frozen_parameters=exclude)
        # In fp32, the parameters are their own masters. (For round-robin gradients, and no others, DeepSpeed's own
        # safe_get_full_fp32_param returns other parameters' masters.)
        in_place = changes["stage"] == 0 or (changes["stage"] < 3 and "dtype" not in changes)
        whole = (lambda parameter: parameter) if in_place else safe_get_full_fp32_param
        _save_oracle(folder, {n: whole(p) for n, p in engine.module.named_parameters() if p.requires_grad})
        engine.destroy()


def _train_torch(root: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    from grasp_dist.training.lora import adapter_config

    out = Path(root)
    for full in (False, True):
        model = _model(full)
        for layer in (model if full else model.base_model.model).model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            model(input_ids=_batch(), labels=_batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights, moments = get_state_dict(model, optimizer)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        whole = {name: tensor.full_tensor() for name, tensor in trained.items()}
        if full:
            folders = ["dcp-full", "own-full"]
            dcp.save({"model": weights, "step": 3}, checkpoint_id=out / "dcp-full")
            _save_own(out / "own-full", trained, None)
        else:
            folders = ["dcp-app", "dcp-lora", "dcp-safetensors", "dcp-consolidated", "own"]
            dcp.save({"app": {"model": weights, "optim": moments}, "step": 3}, checkpoint_id=out / "dcp-app")
            lora = {name: tensor for name, tensor in weights.items() if "lora_" in name}
            dcp.save({"model": lora}, checkpoint_id=out / "dcp-lora")
            for name, consolidate in (("dcp-safetensors", False), ("dcp-consolidated", True)):
                writer = HuggingFaceStorageWriter(
                    str(out / name), save_distributed=True, enable_consolidation=consolidate
                )
                dcp.save(lora, storage_writer=writer)
            _save_own(out / "own", trained, adapter_config(model))
        for name in folders:
            _save_oracle(out / name, whole)


def _save_own(folder: Path, trained: dict[str, Any], adapter: dict[str, Any] | None) -> None:
    """As training saves: flat pieces in safetensors, and the marker last."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    from grasp_dist.architecture import canonical_name
    from grasp_dist.training.checkpoints.pieces import piece_of
    from grasp_dist.training.checkpoints.store import Checkpoints, fingerprint

    parameters = {canonical_name(name): tensor for name, tensor in trained.items()}
    pieces, tensors = {}, {}
    for name, tensor in parameters.items():
        piece = piece_of(tensor)
        pieces |= {f"model.{name}": piece, f"optimizer.exp_avg.{name}": piece.like(torch.ones_like(piece.local))}
        entry = {"shape": list(tensor.shape), "dtype": "float32"}
        tensors |= {f"model.{name}": entry, f"optimizer.exp_avg.{name}": entry}
    step = folder / "step-00000003"
    step.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dcp.save(pieces, storage_writer=HuggingFaceStorageWriter(str(step), save_distributed=True))
    if dist.get_rank() == 0:
        record = {"step": 3, "world_size": dist.get_world_size(), "strategy": "fsdp2", "config": "", "basis": None,
                  "method": "lora" if adapter else "full", "adapter_config": adapter, "tensors": tensors,
                  "versions": {}, "extra": {},
                  "base_model": {"id": "org/base", "revision": "v1", "hash": "0" * 64}}  # fmt: skip
        Checkpoints(folder).commit(step, record, {path.name: fingerprint(path) for path in step.iterdir()})
    dist.barrier()
