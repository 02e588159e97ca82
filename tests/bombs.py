"""Pickles that run a command when they are read carelessly, planted in the files of a checkpoint.

for bomb in bombs(folder, canary):   # every file in turn, every kind; what stood there is put back afterwards
    read(folder)
    assert not canary.exists(), bomb
"""

from __future__ import annotations

import functools
import io
import operator
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["KINDS", "Bomb", "bombs", "explosives"]


@dataclass(frozen=True)
class Bomb:
    """What is planted now, and where."""

    file: Path
    kind: str


class _Call:
    """Is read as function(*arguments), which makes it happen."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._parts = function, arguments

    def __reduce__(self) -> Any:
        return self._parts

    def __call__(self) -> None:
        """Only what can be called may be pickled as a function."""


def explosives(canary: Path) -> dict[str, Any]:
    """Objects whose careless reading makes the file `canary`, by what they call."""
    touch, code = f"touch '{canary}'", f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": _Call(os.system, touch),
        "builtins.exec": _Call(exec, code),
        "builtins.eval": _Call(eval, f"open({str(canary)!r}, 'w')"),
        "builtins.getattr chain": _Call(_Call(getattr, _Call(__import__, "os"), "system"), touch),
        "functools.partial": _Call(functools.partial(os.system, touch)),
        "operator.attrgetter chain": _Call(_Call(operator.attrgetter("system"), _Call(__import__, "os")), touch),
        "io.open": _Call(io.open, str(canary), "w"),
        "a function of torch's": _Call(torch.save, torch.zeros(1), str(canary)),
        "an allowed class with another state": _Call(OrderedDict, [("a", _Call(os.system, touch))]),
    }


def bombs(folder: Path, canary: Path, kinds: tuple[str, ...] | None = None) -> Iterator[Bomb]:
    """Plant one kind of bomb after the other (`KINDS`) in every file of a directory and its folders in turn.

    The files are as they were when the iteration goes on, also when it is left.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        try:
            for kind in kinds or KINDS:
                planted = KINDS[kind](content, canary)
                if planted is not None:
                    file.write_bytes(planted)
                    yield Bomb(file, kind)
        finally:
            file.write_bytes(content)


def _plain(name: str, protocol: int) -> Callable[[bytes, Path], bytes]:
    return lambda content, canary: pickle.dumps(explosives(canary)[name], protocol)


def _saved(name: str, **options: Any) -> Callable[[bytes, Path], bytes]:
    def plant(content: bytes, canary: Path) -> bytes:
        out = io.BytesIO()
        torch.save({"optimizer_state_dict": {"zero_stage": explosives(canary)[name]}}, out, **options)
        return out.getvalue()

    return plant


def _nested(content: bytes, canary: Path) -> bytes | None:
    """Among the tensors of the file itself, where torch wrote it."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return None
    try:
        held = torch.load(io.BytesIO(content), weights_only=False)
    except Exception:  # several archives one after the other, as in *.distcp
        held = {}
    out = io.BytesIO()
    torch.save({**(held if isinstance(held, dict) else {"param": held}), "extra": explosives(canary)["os.system"]}, out)
    return out.getvalue()


def _beside_metadata(content: bytes, canary: Path) -> bytes | None:
    """In the .metadata of torch.distributed.checkpoint, among what belongs there."""
    try:
        metadata = pickle.loads(content)
        metadata.planner_data = [metadata.planner_data, explosives(canary)["builtins.exec"]]
    except Exception:
        return None
    return pickle.dumps(metadata)


def _in_storage(content: bytes, canary: Path) -> bytes:
    """In the place of a storage's key: what a persistent id is made of is unpickled as well."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            bomb = explosives(canary)["os.system"]
            return ("storage", torch.FloatStorage, bomb, "cpu", 4) if isinstance(value, torch.Tensor) else None

    program = io.BytesIO()
    Pickler(program, 2).dump({"param": torch.zeros(2)})
    return _archive(program.getvalue())


def _dotted(content: bytes, canary: Path) -> bytes:
    """An attribute of an allowed module, as protocol 4 can name it: torch.serialization's os.system."""
    return _program(b"torch.serialization", b"os.system", canary)


def _allowed_module(content: bytes, canary: Path) -> bytes:
    """A function of a module from which other names are allowed."""
    return _program(b"torch.distributed.checkpoint.metadata", b"os.system", canary)


def _program(module: bytes, name: bytes, canary: Path) -> bytes:
    text = f"touch '{canary}'".encode()
    strings = [b"\x8c" + bytes([len(part)]) + part for part in (module, name, text)]
    return b"\x80\x04" + strings[0] + strings[1] + b"\x93" + strings[2] + b"\x85R."


def _archive(program: bytes, **more: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name, part in more.items():
            archive.writestr(f"archive/{name}", part)
    return out.getvalue()


KINDS: dict[str, Callable[[bytes, Path], bytes | None]] = {
    **{f"{name}, protocol {protocol}": _plain(name, protocol) for name in ("os.system", "builtins.exec")
       for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
    **{f"{name}, saved by torch": _saved(name) for name in explosives(Path("canary"))},
    "saved by torch, protocol 4": _saved("os.system", pickle_protocol=4),
    "saved by torch before 1.6": _saved("os.system", _use_new_zipfile_serialization=False),
    "among the file's own tensors": _nested,
    "in the metadata": _beside_metadata,
    "in a storage": _in_storage,
    "a dotted name": _dotted,
    "a dotted name of an allowed module": _allowed_module,
    "an archive of protocol 4": lambda content, canary: _archive(_dotted(content, canary)),
}  # fmt: skip
"""name -> (the file's content, the canary) -> what to write there, or None where the kind does not fit."""
