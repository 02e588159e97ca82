"""Model directories: where the weights of one stand, reading slices of them into a sharded model, and writing one.

A rank reads only the rows that it holds, straight from the safetensors. Checkpoint names are translated by the rules
that transformers itself uses (renamed modules, a missing base-model prefix). Where these rules also *compute* weights
(experts that are fused on loading), each rank loads the whole model with `from_pretrained` on the CPU and keeps its
part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from grasp_dist.architecture import canonical_name
from grasp_dist.errors import InputError
from grasp_dist.training.files import replace_folder
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.sharding import fill, local_slices, whole_tensor
from grasp_dist.training.zero_parameters import is_zero, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "bare_model",
    "base_model",
    "checkpoint_names",
    "is_adapter",
    "load_weights",
    "named_parameters",
    "save_model",
    "weight_files",
]

_logger = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
_FILE_BYTES = 2 * 2**30
"""Size at which `save_model` begins a new file; what rank 0 holds beside the model."""


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a LoRA factor."""
    return ".lora_" in name


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator,return-value]


def named_parameters(model: nn.Module) -> Iterator[tuple[list[str], nn.Parameter]]:
    """The base model's parameters, each once, with all its names: tied parameters have several."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_adapter(name):
            names.setdefault(id(parameter), []).append(canonical_name(name))
            parameters[id(parameter)] = parameter
    return ((names[key], parameter) for key, parameter in parameters.items())


@torch.no_grad()
def load_weights(model: nn.Module, model_dir: str | Path, parallel: Parallel) -> None:
    """Read this rank's part of every base parameter and saved buffer from a model directory, cast to what is there.

    model: on its device, sharded or not, with or without adapters, which are left as they are. Raises `InputError` for
    a directory without safetensors, and for a missing or misshapen weight, by name.
    """
    folder = Path(model_dir)
    with ExitStack() as stack:
        source = _open(folder, model, parallel, stack)
        for names, parameter in named_parameters(model):
            found = next((name for name in names if name in source.shapes), None)
            if found is None:
                raise InputError(
                    f"{folder} has no weight {names[0]!r}, which its config.json asks for; copy or download the model "
                    "again, or correct config.json"
                )
            if source.shapes[found] != shape_of(parameter):
                raise InputError(
                    f"{found!r} has shape {source.shapes[found]} in {folder}, but {shape_of(parameter)} by its "
                    "config.json; the two are of different models"
                )
            fill(parameter, lambda slices, found=found: source.read(found, slices))  # type: ignore[misc]
        for name, buffer in base_model(model).named_buffers():
            name = canonical_name(name)
            if name in source.shapes and source.shapes[name] == tuple(buffer.shape):
                buffer.copy_(source.read(name, local_slices(buffer)))


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, path: str | Path, parallel: Parallel
) -> None:
    """Write an ordinary Hugging Face model directory; collective.

    The weights are gathered one by one, and rank 0 writes them, in the dtype that they have (fp32 masters stay fp32),
    into safetensors files of about 2 GiB. The directory appears under its name when it is whole. Raises `InputError`,
    on every rank, if the disk is full or read-only.
    """
    base = base_model(model)
    if any(is_adapter(name) for name, _ in model.named_parameters()):
        raise InputError("a model with a LoRA adapter is saved with save_adapter; merge the adapter to save it whole")

    def gather() -> Iterator[tuple[str, Tensor]]:
        for names, parameter in named_parameters(model):
            yield names[0], whole_tensor(parameter)
        saved = base.state_dict().keys()
        for name, buffer in base.named_buffers():
            if name in saved:
                yield canonical_name(name), buffer

    with replace_folder(path, parallel) as target:
        target.write(lambda folder: _write_config(base, tokenizer, folder))
        writer = _Writer(bare_model(base))
        for name, tensor in gather():
            target.write(lambda folder, name=name, tensor=tensor: writer.add(folder, name, tensor))  # type: ignore[misc]
        target.write(writer.finish)


class _Writer:
    """Collects tensors, under the names and in the form of the architecture's checkpoints, into files of limited size;
    names the files and writes the index when all are there."""

    def __init__(self, skeleton: PreTrainedModel) -> None:
        self._skeleton = skeleton
        self._pending: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._parts: list[list[str]] = []

    def add(self, folder: Path, name: str, tensor: Tensor) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        for key, value in revert_weight_conversion(self._skeleton, {name: tensor}).items():
            self._add(folder, key, value)

    def _add(self, folder: Path, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > _FILE_BYTES:
            self._flush(folder)
        self._pending[name] = tensor.cpu().contiguous()
        self._bytes += size
        self._total += size

    def finish(self, folder: Path) -> None:
        self._flush(folder)
        count = len(self._parts)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._parts, start=1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (folder / f"part-{number}").rename(folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self, folder: Path) -> None:
        self._parts.append(list(self._pending))
        save_file(self._pending, folder / f"part-{len(self._parts)}", metadata={"format": "pt"})
        self._pending, self._bytes = {}, 0


def _write_config(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    config = base.config
    first = next(base.parameters())
    dtype, config.dtype = config.dtype, torch.float32 if is_zero(first) and first.requires_grad else first.dtype
    try:
        config.architectures = [_plain_class(base).__name__]
        config.save_pretrained(folder)
    finally:
        config.dtype = dtype
    if base.can_generate():
        base.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _plain_class(base: nn.Module) -> type:
    # fully_shard puts a class of its own in front.
    return next(kind for kind in type(base).__mro__ if not kind.__name__.startswith("FSDP"))


def bare_model(base: PreTrainedModel) -> PreTrainedModel:
    """The model without weights. Transformers looks its conversions up by class name, which `fully_shard` changes."""
    with torch.device("meta"):
        return _plain_class(base)(base.config)


class _Source:
    """Named tensors of a model directory under the model's own names: their shapes, and slices of them."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, Callable[[tuple[slice, ...]], Tensor]] = {}

    def add(self, name: str, shape: tuple[int, ...], read: Callable[[tuple[slice, ...]], Tensor]) -> None:
        self.shapes[name], self._readers[name] = shape, read

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        return self._readers[name](slices)


def _open(folder: Path, model: nn.Module, parallel: Parallel, stack: ExitStack) -> _Source:
    source = _Source()
    handles = [_open_file(path, stack) for path in weight_files(folder)]
    known = {name for names, _ in named_parameters(model) for name in names}
    known |= {canonical_name(name) for name, _ in base_model(model).named_buffers()}
    rename = checkpoint_names(base_model(model), known)
    for handle in handles:
        for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
            name = rename(key)
            if name is None:
                return _converted(folder, base_model(model), parallel)
            part = handle.get_slice(key)
            source.add(name, tuple(part.get_shape()), _slice_reader(handle, key))
    if unused := sorted(source.shapes.keys() - known):
        _logger.info("%s holds %d tensors that the model has no place for, such as %s", folder, len(unused), unused[0])
    return source


def _slice_reader(handle: Any, key: str) -> Callable[[tuple[slice, ...]], Tensor]:
    # A 0-d tensor has no slices.
    return lambda slices: handle.get_slice(key)[slices] if slices else handle.get_tensor(key)


def _open_file(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); copy or download it again") from None


def weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        try:
            weight_map = json.loads((folder / _INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise InputError(f"{folder / _INDEX} is not a safetensors index ({error}); download it again") from None
        files = [folder / name for name in sorted(set(weight_map.values()))]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        held = "only *.bin files" if any(folder.glob("*.bin")) else "no weights"
        raise InputError(
            f"{folder} has {held}, and only safetensors are read; write them with "
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`"
        )
    if missing := [path.name for path in files if not path.is_file()]:
        raise InputError(f"{folder} lacks {missing[0]}, which its {_INDEX} names; copy or download the model again")
    return files


def checkpoint_names(base: PreTrainedModel, known: set[str]) -> Callable[[str], str | None]:
    """Checkpoint name -> the model's own name, or None where a weight is computed from several of the checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(bare_model(base))
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    places = dict.fromkeys(known, True)

    def rename(key: str) -> str | None:
        if key in known:
            return key
        name, converted = rename_source_key(key, renamings, converters, base.base_model_prefix, places)
        return None if converted is not None and name in known else name

    return rename


def _converted(folder: Path, base: PreTrainedModel, parallel: Parallel) -> _Source:
    from transformers import AutoModelForCausalLM

    if parallel.is_main:
        _logger.warning(
            "transformers converts the weights of %s while loading (%s); every process reads all of them on the CPU",
            folder,
            base.config.model_type,
        )
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    source = _Source()
    for name, tensor in whole.state_dict().items():
        source.add(name, tuple(tensor.shape), lambda slices, tensor=tensor: tensor[slices])  # type: ignore[misc]
    return source
