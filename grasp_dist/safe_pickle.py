"""Reading what other programs pickled, without running anything that is in it.

A pickle is a program: it names functions and calls them. DeepSpeed's and torch.distributed.checkpoint's files are
pickles, so they are read here, and nowhere else, under two rules:
- every global that a file names must be on a list of exact names, held against the file before it is read;
- what does not make tensors is replaced by classes that only keep what they are given. They are made anew for every
  file, so that not even they can be changed by one.
Tensors are then made by `torch.load(weights_only=True)`, mapped into memory: a piece is read when it is used.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from grasp_dist.errors import InputError

__all__ = ["load_metadata", "load_piece", "load_tensors"]

_logger = logging.getLogger(__name__)

_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128",
    )
}  # fmt: skip

# What `torch.load(weights_only=True)` makes itself, as far as a checkpoint of tensors and settings needs it.
_TENSORS = frozenset(
    {
        "collections.OrderedDict",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.Size",
        "torch.Tensor",
        "torch.storage.UntypedStorage",
        *(f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16")),
        *(f"torch.{kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
        *_DTYPES,
    }
)
# What DeepSpeed puts beside the tensors; read as an empty object, or (the enumeration) as a number.
_DEEPSPEED_OBJECTS = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_DEEPSPEED_NUMBERS = ("deepspeed.runtime.zero.config.ZeroStageEnum",)
# What is in the `.metadata` of torch.distributed.checkpoint, read as objects with the same attributes.
_DCP = "torch.distributed.checkpoint"
_DCP_OBJECTS = (
    *((f"{_DCP}.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
)  # fmt: skip


def load_tensors(path: str | os.PathLike[str], *, trust: bool = False) -> Any:
    """What `torch.save` wrote into `path`, with its tensors on the CPU, mapped into memory.

    Objects of DeepSpeed's are inert stand-ins. trust: unpickle whatever there is, which runs what the file says; with a
    warning. Raises `InputError` for a file that names anything else than tensors need, saying what, and for a damaged
    one.
    """
    path = Path(path)
    if trust:
        return _trusted(
            path, lambda: torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))
        )
    with _opened(path) as file:
        _check_archive(path, file)
    return _weights_only(path, str(path), mmap=True)


def load_piece(path: str | os.PathLike[str], offset: int, length: int, *, trust: bool = False) -> Tensor:
    """The tensor that `torch.save` wrote into bytes offset : offset + length of `path`, as *.distcp files have them.

    As `load_tensors` otherwise; the piece is read into memory.
    """
    path = Path(path)
    with _opened(path) as file:
        file.seek(offset)
        content = io.BytesIO(file.read(length))
    if trust:
        tensor = _trusted(path, lambda: torch.load(content, map_location="cpu", weights_only=False))
    else:
        _check_archive(path, content)
        content.seek(0)
        tensor = _weights_only(path, content, mmap=False)
    if not isinstance(tensor, Tensor):
        raise InputError(f"{path} holds no tensor at byte {offset}; its checkpoint is damaged: save it again")
    return tensor


def load_metadata(path: str | os.PathLike[str], *, trust: bool = False) -> Any:
    """The `.metadata` of a torch.distributed.checkpoint directory: an object with the attributes of its `Metadata`.

    Errors and `trust` as in `load_tensors`.
    """
    path = Path(path)
    with _opened(path) as file:
        if trust:
            return _trusted(path, lambda: pickle.load(file))
        try:
            return _MetadataUnpickler(file).load()
        except _RefusedError as refused:
            raise _refusal(path, [str(refused)]) from None
        except Exception as error:
            raise _damaged(path, error) from None


class _RefusedError(Exception):
    """A global that is not on the list."""


class _Inert:
    """Keeps the state that a pickle gives it, and can do nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        known: dict[tuple[str, str], Any] = {key: type(key[1], (_Inert,), {}) for key in _DCP_OBJECTS}
        known["torch", "Size"] = type("Size", (tuple,), {})
        self._known = known | {("torch", name.removeprefix("torch.")): dtype for name, dtype in _DTYPES.items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise _RefusedError(f"{module}.{name}")
        return self._known[module, name]


def _weights_only(path: Path, source: str | io.BytesIO, *, mmap: bool) -> Any:
    stand_ins: list[Any] = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in _DEEPSPEED_OBJECTS]
    stand_ins += [(type(name.rpartition(".")[2], (int,), {}), name) for name in _DEEPSPEED_NUMBERS]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # its reader raises whatever the content leads it to
        raise _damaged(path, error) from None


def _trusted(path: Path, read: Any) -> Any:
    _logger.warning("%s is unpickled in full, as you asked: whatever code is in it runs", path)
    try:
        return read()
    except Exception as error:
        raise _damaged(path, error) from None


def _check_archive(path: Path, file: IO[bytes]) -> None:
    """Refuse what is no archive of `torch.save`, and one whose pickle names anything that is not on the list."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            pickles = [info for info in infos if info.filename.endswith(".pkl")]
            if any(info.filename.endswith("/constants.pkl") for info in infos):
                raise _refusal(path, ["a TorchScript program"])
            if not pickles or any(info.compress_type != zipfile.ZIP_STORED for info in pickles):
                raise zipfile.BadZipFile("it has no data.pkl as torch.save writes it")
            named = [name for info in pickles for name in _globals(archive.read(info))]
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path} is no whole archive of torch.save ({error}); copy the checkpoint again. What torch before 1.6 "
            "wrote is not read: load it where you trust it, and save it again"
        ) from None
    except Exception as error:
        raise _damaged(path, error) from None
    allowed = {*_TENSORS, *_DEEPSPEED_OBJECTS, *_DEEPSPEED_NUMBERS}
    if refused := sorted(set(named) - allowed):
        raise _refusal(path, refused)


def _globals(content: bytes) -> Iterable[str]:
    """ "module.name" of every global that a pickle names. Reads its instructions, and carries none out."""
    memo: dict[int, Any] = {}
    recent: list[Any] = [None, None]
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        kind = opcode.name
        if kind in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif kind == "STACK_GLOBAL":
            yield f"{recent[-2]}.{recent[-1]}"
        elif kind in ("EXT1", "EXT2", "EXT4"):
            yield f"copyreg extension {argument}"
        if kind == "MEMOIZE":
            memo[len(memo)] = recent[-1]
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = recent[-1]
        elif kind in ("GET", "BINGET", "LONG_BINGET"):
            recent.append(memo.get(int(argument)))
        elif kind not in ("PROTO", "FRAME"):
            recent.append(argument if isinstance(argument, str) else None)


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); copy the checkpoint again") from None


def _refusal(path: Path, names: list[str]) -> InputError:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return InputError(
        f"{path} is a pickle that asks for {shown}, which tensors do not need and which can run code; nothing of it "
        "was loaded. If you trust whoever wrote the file, add --trust-checkpoint (trust=True in Python), which runs "
        "it; else save the weights as safetensors where they were trained"
    )


def _damaged(path: Path, error: Exception) -> InputError:
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return InputError(f"{path} cannot be read ({type(error).__name__}: {first}); copy the checkpoint again")
