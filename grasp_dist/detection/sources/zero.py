"""DeepSpeed checkpoints: ZeRO stages 0 to 3 on any number of ranks, and universal ones. DeepSpeed itself is not needed.

    <root>/latest                                           the name of the folder below
    <root>/<tag>/[zero_pp_rank_*_]mp_rank_00_model_states.pt      names and shapes, by parameter group, in stored order
    <root>/<tag>/[bf16_]zero_pp_rank_*_mp_rank_00_optim_states.pt   each rank's fp32 masters, flat

Stages 1 and 2: a group's parameters, one after the other, maybe each with padding behind it, are cut into one run per
rank. Stage 3: every parameter is cut into one run per rank, the last one padded, and a rank's runs stand one after the
other over all its groups. Universal: <tag>/zero/<parameter>/fp32.pt, whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_dist.detection.sources.source import TensorSource, check_inside, is_shape
from grasp_dist.errors import InputError
from grasp_dist.safe_pickle import load_tensors

__all__ = ["find_tag", "open_zero"]

_LATEST = ("latest", "latest_universal")
_MODEL = re.compile(r"^(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
_OPTIMIZER = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")
_ALONE = "only data-parallel checkpoints are read; convert it with `python -m deepspeed.checkpoint.ds_to_universal`"


def find_tag(folder: Path) -> Path | None:
    """The folder with the files of a DeepSpeed checkpoint: `folder` itself or one in it; None if it is no such one.

    Raises `InputError` for a `latest` that names no folder here, and for several steps without one.
    """
    if _holds(folder):
        return folder
    for name in _LATEST:
        if (file := folder / name).is_file():
            with file.open("rb") as opened:
                content = opened.read(1024)
            tag = content.decode(errors="replace").strip()
            found = check_inside(folder, tag, file)
            if not tag.isprintable() or not _holds(found):
                raise InputError(
                    f"{file} names {tag[:80]!r}, which is no checkpoint in {folder}; give the step's folder"
                )
            return found
    steps = sorted(path for path in folder.glob("global_step*") if _holds(path))
    if len(steps) > 1:
        raise InputError(f"{folder} holds several steps ({steps[0].name}, {steps[1].name}, ..); give the folder of one")
    return steps[0] if steps else None


def open_zero(tag: Path, *, trust: bool = False) -> TensorSource:
    """The trained weights in a folder that `find_tag` found: fp32 masters, where the stage keeps any.

    Raises `InputError` for what `load_tensors` refuses, a rank's missing file, sizes that do not fit, and model,
    pipeline or expert parallelism.
    """
    folders = (tag, tag.parent)
    if (tag / "zero").is_dir():
        return _universal(tag, trust)
    model_files, optimizer_files = _ranks(tag, _MODEL), _ranks(tag, _OPTIMIZER)
    if odd := [path.name for path in sorted(tag.glob("*.pt")) if path.name.startswith(("layer_", "expp_"))]:
        raise InputError(f"{tag} is of a pipeline or of parallel experts ({odd[0]}): {_ALONE}")
    states = _mapping(load_tensors(model_files[0], trust=trust), model_files[0])
    groups = states.get("param_shapes")
    rounded_to = _dtype(states.get("ds_config"))
    if not groups:
        weights = {str(key): value for key, value in (states.get("module") or {}).items() if isinstance(value, Tensor)}
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        return TensorSource(
            tag, "DeepSpeed checkpoint, stage 0", shapes, lambda name: weights[name].detach().clone(), None, rounded_to,
            folders=folders,
        )  # fmt: skip
    if not optimizer_files:
        raise InputError(f"{tag} has no *_optim_states.pt, where ZeRO keeps the trained weights; copy it whole")
    layout = _Layout(tag, _shapes(groups, model_files[0]), optimizer_files, trust)
    return TensorSource(
        tag, f"DeepSpeed checkpoint, stage {layout.stage}", layout.shapes, layout.read, frozenset(layout.shapes),
        rounded_to, folders=folders,
    )  # fmt: skip


class _Layout:
    """Where each parameter stands in the ranks' flat masters."""

    def __init__(
        self, tag: Path, groups: Sequence[Mapping[str, tuple[int, ...]]], files: Sequence[Path], trust: bool
    ) -> None:
        self._tag, self._world = tag, len(files)
        states = [_optimizer_state(path, trust) for path in files]
        by_parameter = "fp32_flat_groups" in states[0]
        stage = states[0].get("zero_stage")
        self.stage = int(stage) if isinstance(stage, int) else 3 if by_parameter else 1
        key = "fp32_flat_groups" if by_parameter else "single_partition_of_fp32_groups"
        self._masters = [_masters(state, key, path) for state, path in zip(states, files, strict=True)]
        self._check_world(states[0])
        self.shapes = {name: shape for group in groups for name, shape in group.items()}
        if by_parameter:
            # Sub-groups follow each other as the parameters do.
            self._places = self._place_by_parameter(groups)
        else:
            self._places = self._place_by_group(groups, states[0].get("param_alignment_paddings"))

    def read(self, name: str) -> Tensor:
        """A whole parameter, fp32, out of every rank's run of it."""
        shape = self.shapes[name]
        pieces = [_cut(runs, start, stop) for runs, start, stop in self._places[name]()]
        whole = torch.cat([part for parts in pieces for part in parts] or [torch.empty(0)])
        return whole[: math.prod(shape)].view(shape)

    def _place_by_group(
        self, groups: Sequence[Mapping[str, tuple[int, ...]]], paddings: Any
    ) -> dict[str, Callable[[], list[tuple[list[Tensor], int, int]]]]:
        if any(len(runs) != len(groups) for runs in self._masters):
            raise self._misfit("the number of parameter groups differs between its files")
        places: dict[str, Any] = {}
        for index, group in enumerate(groups):
            runs = [own[index] for own in self._masters]
            behind = paddings[index] if isinstance(paddings, list) else [0] * len(group)
            at = 0
            for (name, shape), padding in zip(group.items(), behind, strict=True):
                start, stop = at, at + math.prod(shape)
                places[name] = lambda runs=runs, start=start, stop=stop: [(runs, start, stop)]
                at = stop + int(padding)
            # The end is padded to a multiple of twice the ranks, or not at all.
            found, unit = sum(run.numel() for run in runs), 2 * self._world
            if math.ceil(at / unit) != math.ceil(found / unit) or found < at:
                raise self._misfit(f"group {index} has {found} numbers for parameters of {at}")
        return places

    def _place_by_parameter(
        self, groups: Sequence[Mapping[str, tuple[int, ...]]]
    ) -> dict[str, Callable[[], list[tuple[list[Tensor], int, int]]]]:
        places: dict[str, Any] = {}
        at = 0
        for group in groups:
            for name, shape in group.items():
                start, stop = at, at + math.ceil(math.prod(shape) / self._world)
                places[name] = lambda start=start, stop=stop: [(runs, start, stop) for runs in self._masters]
                at = stop
        found = {sum(run.numel() for run in runs) for runs in self._masters}
        if found != {at}:
            raise self._misfit(f"its ranks have {sorted(found)} numbers for parameters of {at} on each")
        return places

    def _check_world(self, state: Mapping[str, Any]) -> None:
        counts = state.get("partition_count", self._world)
        counts = [counts] if isinstance(counts, int) else list(counts)
        counts += [group.get("partition_count") for group in state.get("ds_zero_partition_groups") or []]
        if any(count != self._world for count in counts):
            raise self._misfit(f"it was saved by {counts} ranks, and {self._world} *_optim_states.pt are here")

    def _misfit(self, what: str) -> InputError:
        return InputError(f"{self._tag} does not fit together: {what}; copy it whole, or use another step")


def _cut(runs: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Numbers start:stop of the runs set end to end, as views."""
    parts, at = [], 0
    for run in runs:
        low, high = max(start - at, 0), min(stop - at, run.numel())
        if low < high:
            parts.append(run[low:high])
        at += run.numel()
    return parts


def _universal(tag: Path, trust: bool) -> TensorSource:
    files = {path.name: path / "fp32.pt" for path in sorted((tag / "zero").iterdir()) if (path / "fp32.pt").is_file()}
    if not files:
        raise InputError(f"{tag} has no zero/<parameter>/fp32.pt; convert the checkpoint again with ds_to_universal")
    recorded: dict[str, tuple[int, ...]] = {}
    rounded_to = None
    if states_file := next(iter(sorted(tag.glob("*_model_states.pt"))), None):
        states = _mapping(load_tensors(states_file, trust=trust), states_file)
        rounded_to = _dtype(states.get("ds_config"))
        groups = [*(states.get("param_shapes") or []), states.get("frozen_param_shapes") or {}]
        recorded = {name: shape for group in _shapes(groups, states_file) for name, shape in group.items()}

    def read(name: str) -> Tensor:
        content = load_tensors(files[name], trust=trust)
        tensor = content.get("param") if isinstance(content, dict) else content
        if not isinstance(tensor, Tensor) or tensor.numel() != math.prod(recorded.get(name, tensor.shape)):
            raise InputError(f"{files[name]} does not hold its parameter; convert the checkpoint again")
        # Of stage 3 it is flat.
        return tensor.detach().clone().view(recorded.get(name, tensor.shape))

    return TensorSource(
        path=tag,
        kind="DeepSpeed universal checkpoint",
        shapes={name: recorded[name] if name in recorded else tuple(read(name).shape) for name in files},
        read=read,
        # Frozen weights are there as well, without moments.
        trained=frozenset(name for name, file in files.items() if file.with_name("exp_avg.pt").is_file()),
        rounded_to=rounded_to,
        folders=(tag, tag.parent),
    )


def _holds(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "zero").is_dir() or any(folder.glob("*_model_states.pt")))


def _ranks(tag: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of one kind, by rank. Raises `InputError` where one is missing, or for model parallelism."""
    files: dict[int, Path] = {}
    for path in tag.iterdir():
        if match := pattern.match(path.name):
            if int(match["mp"]):
                raise InputError(f"{tag} is of a model cut over ranks ({path.name}): {_ALONE}")
            files[int(match["rank"] or 0)] = path
    if pattern is _MODEL and not files:
        raise InputError(f"{tag} has no *_model_states.pt of model-parallel rank 0; copy the checkpoint whole")
    if missing := sorted(set(range(max(files, default=-1) + 1)) - files.keys()):
        raise InputError(f"{tag} lacks the file of rank {missing[0]} beside {files[max(files)].name}; copy it whole")
    return [files[rank] for rank in sorted(files)]


def _optimizer_state(path: Path, trust: bool) -> Mapping[str, Any]:
    return _mapping(_mapping(load_tensors(path, trust=trust), path).get("optimizer_state_dict"), path)


def _masters(state: Mapping[str, Any], key: str, path: Path) -> list[Tensor]:
    runs = state.get(key)
    if not isinstance(runs, list | tuple) or not all(
        isinstance(run, Tensor) and run.ndim == 1 and run.is_floating_point() for run in runs
    ):
        raise InputError(f"{path} holds no fp32 masters as ZeRO writes them ({key}); copy it again")
    return [run.detach() for run in runs]


def _shapes(groups: Any, path: Path) -> list[dict[str, tuple[int, ...]]]:
    well_formed = isinstance(groups, list | tuple) and all(
        isinstance(group, dict) and all(isinstance(name, str) and is_shape(shape) for name, shape in group.items())
        for group in groups
    )
    if not well_formed:
        raise InputError(f"{path} does not say which parameters it has (param_shapes); copy it again")
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def _dtype(config: Any) -> torch.dtype | None:
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        section = config.get(key) if isinstance(config, dict) else None
        if isinstance(section, dict) and section.get("enabled") is True:
            return dtype
    return None


def _mapping(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path} is no file of a DeepSpeed checkpoint; copy it again")
    return value
