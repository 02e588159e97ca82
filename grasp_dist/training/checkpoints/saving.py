"""Saving and reading the state of a run in mid-flight: weights, moments, pins, and where the run stands.

Tensors go through torch.distributed.checkpoint into safetensors; what else there is, as JSON, into the marker. With
`background`, a save only copies the state; writing, checksums and the marker follow in a thread, over a process group
of its own, while training goes on.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from grasp_dist.errors import InputError
from grasp_dist.manifest import versions
from grasp_dist.training.checkpoints.pieces import FlatPiece
from grasp_dist.training.checkpoints.store import Checkpoints, check_files, fingerprint, read_marker
from grasp_dist.training.engines import Engine
from grasp_dist.training.files import describe_write_error
from grasp_dist.training.parallel import Parallel

if TYPE_CHECKING:
    from grasp_dist.projection import GraspProjector

__all__ = ["Keeper"]


class Keeper:
    """Saves and finds the checkpoints of one training run. Every method but `due` and `close` is collective."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        parallel: Parallel,
        *,
        identity: Mapping[str, Any] | None = None,
        every: int | None = None,
        background: bool = False,
        guard: Callable[[], None] | None = None,
    ) -> None:
        """identity: JSON values that say what is trained; they stand in every record, and `config` among them must be
        equal for a checkpoint to be continued from. every: `due` is true each so many steps. background: write while
        training goes on. guard: called on rank 0 before a checkpoint is made valid; raises if it must not be."""
        self.checkpoints, self.every = checkpoints, every
        self._parallel, self._identity = parallel, dict(identity or {})
        self._background, self._guard = background, guard
        self._group: dist.ProcessGroup | None = None
        if background and parallel.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._buffers: dict[str, Tensor] = {}
        self._known_basis: tuple[Any, str | None] = (None, None)
        self._saved: int | None = None
        self._begun = 0.0

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs behind this step, counted from 1."""
        return self.every is not None and step % self.every == 0

    def save(
        self,
        step: int,
        engine: Engine,
        projector: GraspProjector | None,
        extra: dict[str, Any],
        *,
        finish: bool = False,
    ) -> None:
        """Save the state behind `step`, unless this was done; a save under way is finished first. extra: JSON values
        that `resume` returns.

        finish: return when the checkpoint is valid, also with `background`. Raises `InputError` on every rank, also for
        the save before, when the disk is full or read-only; what was saved before is kept.
        """
        if step != self._saved:
            self.wait()
            self._begin(step, engine, projector, extra)
            self._saved = step
        if finish:
            self.wait()

    def wait(self) -> None:
        """Return when the save under way is valid. Raises what it failed with, on every rank."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        self._parallel.share_error(failure)

    def close(self) -> None:
        """Let a save under way come to its end, whatever has ended training; not collective. A save that a dead rank
        holds up is given up after a minute."""
        if self._thread is not None:
            self._thread.join(timeout=60)

    def resume(
        self,
        engine: Engine,
        projector: GraspProjector | None,
        *,
        usable: Callable[[dict[str, Any]], bool] = lambda record: True,
        say: Callable[[str], None] = print,
    ) -> dict[str, Any] | None:
        """Read the newest valid checkpoint into engine and projector, in place, and return its `extra`; None if there
        is none. usable(record): whether it may be continued from; called on rank 0.

        Damaged and unfinished ones are passed over, and `say` is told why, on rank 0. World size, sharding and engine
        may be others than when it was saved; with the same ones everything is restored bit for bit. Raises `InputError`
        for a checkpoint of another model, or of a projector with another basis.
        """
        found = self.find(usable=usable, say=say)
        if found is None:
            return None
        folder, record = found
        tensors = _tensors(engine, projector)
        _check_same(record, _shapes(tensors, engine), tensors, self._basis(projector), folder)
        reader = dcp.HuggingFaceStorageReader(str(folder))

        def read() -> None:
            with _quiet():
                dcp.load(tensors, storage_reader=reader, no_dist=self._parallel.world_size == 1)

        self._attempt(folder, read, reading=True)
        engine.loaded()
        if projector is not None:
            pins = {name.removeprefix("pins."): value for name, value in tensors.items() if name.startswith("pins.")}
            projector.load_state_dict(pins)
        return record["extra"]

    def find(
        self,
        *,
        usable: Callable[[dict[str, Any]], bool] = lambda record: True,
        say: Callable[[str], None] = print,
    ) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is valid and usable, and its record. The ranks share the reading."""
        parallel = self._parallel
        names = parallel.broadcast_object(
            [path for _, path in self.checkpoints.folders()] if parallel.is_main else None
        )
        for folder in names:
            record: dict[str, Any] = {}
            error: Exception | None = None
            if parallel.is_main:
                try:
                    record = read_marker(folder)
                    check_files(folder, record, [])
                except InputError as caught:
                    error = caught
            record, error = parallel.broadcast_object((record, error))
            if error is None:
                try:
                    own = sorted(record["files"])[parallel.world_rank :: parallel.world_size]
                    check_files(folder, record, own)
                except InputError as caught:
                    error = caught
                errors = [found for found in parallel.gather_objects(error) if found is not None]
                error = errors[0] if errors else None
            fits = error is None and record.get("config") == self._identity.get("config")
            fits = parallel.broadcast_object(fits and usable(record) if parallel.is_main else None)
            if fits:
                return folder, record
            if parallel.is_main:
                say(f"passed over: {error or f'{folder} is of another configuration, or goes too far'}")
        return None

    # -- inside

    def _basis(self, projector: GraspProjector | None) -> str | None:
        """What identifies the projector's basis, which rank 0 reads through once."""
        basis = None if projector is None else projector.basis
        if basis is not self._known_basis[0]:
            found = basis.fingerprint() if basis is not None and self._parallel.is_main else None
            self._known_basis = basis, self._parallel.broadcast_object(found)
        return self._known_basis[1]

    def _begin(self, step: int, engine: Engine, projector: GraspProjector | None, extra: dict[str, Any]) -> None:
        self._begun = time.monotonic()
        tensors = _tensors(engine, projector)
        record = {
            **self._identity,
            "step": step,
            "world_size": self._parallel.world_size,
            "strategy": self._parallel.strategy,
            "basis": self._basis(projector),
            "versions": versions(),
            "tensors": {
                name: {"shape": list(shape), "dtype": str(tensors[name].dtype).removeprefix("torch.")}
                for name, shape in _shapes(tensors, engine).items()
            },
            "extra": extra,
        }
        folder = self.checkpoints.folder(step)
        self._attempt(folder, (lambda: self.checkpoints.prepare(step)) if self._parallel.is_main else None)
        if not self._background:
            self._write(folder, tensors, record, None)
        else:
            staged = self._stage(tensors)
            self._thread = threading.Thread(target=self._in_thread, args=(folder, staged, record), daemon=True)
            self._thread.start()

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in this process' memory, in buffers that are used again."""
        staged: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            local = _local(tensor)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape:
                self._buffers[name] = buffer = torch.empty_like(local, device="cpu")
            buffer.copy_(local, non_blocking=True)
            if isinstance(tensor, FlatPiece):
                staged[name] = tensor.like(buffer)
            elif isinstance(tensor, DTensor):
                staged[name] = _Chunk(buffer, tensor)
            else:
                staged[name] = buffer
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged

    def _in_thread(self, folder: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        try:
            self._write(folder, tensors, record, self._group)
        except BaseException as error:  # whatever ends this thread, `wait` must hear of it
            self._failure = _cause(error)

    def _write(
        self, folder: Path, tensors: dict[str, Tensor], record: dict[str, Any], group: dist.ProcessGroup | None
    ) -> None:
        parallel = self._parallel
        files: dict[str, Any] = {}

        def write() -> None:
            writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
            with _quiet():
                dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=parallel.world_size == 1)
            for path in folder.glob(f"shard-{parallel.world_rank + 1:05d}-*"):  # the writer has synced it
                files[path.name] = fingerprint(path)

        self._attempt(folder, write, group)
        every = _gather(files, parallel, group)

        def commit() -> None:
            if self._guard is not None:
                self._guard()
            # How long this took, which is what a scheduler has to leave before it kills.
            timed = {**record, "seconds": round(time.monotonic() - self._begun, 3)}
            self.checkpoints.commit(folder, timed, {name: entry for own in every for name, entry in own.items()})
            self.checkpoints.prune()

        self._attempt(folder, commit if parallel.is_main else None, group)

    def _attempt(
        self, folder: Path, action: Callable[[], object] | None, group: Any = None, *, reading: bool = False
    ) -> None:
        """Run `action` on the ranks that have one; all raise if any failed."""
        error: Exception | None = None
        if action is not None:
            try:
                action()
            except (Exception, CheckpointException) as found:
                error = _cause(found)
                if not reading:
                    error = describe_write_error(error, folder)
                elif not isinstance(error, InputError):
                    error = InputError(f"{folder} cannot be read ({error}); remove it, and run the same command again")
        found_by_rank = [
            e for e in _gather(None if error is None else (type(error), str(error)), self._parallel, group) if e
        ]
        if error is not None:
            raise error
        if found_by_rank:
            kind, message = found_by_rank[0]
            raise (InputError if issubclass(kind, InputError) else RuntimeError)(message)


class _Chunk(FlatPiece):
    """A copy of a DTensor's local part, in any number of dimensions."""

    source: Any

    @staticmethod
    def __new__(cls, local: Tensor, source: DTensor) -> _Chunk:
        self = Tensor._make_wrapper_subclass(cls, tuple(source.shape), dtype=local.dtype, device=local.device)  # type: ignore[attr-defined]
        self.local, self.source = local, source
        return self

    def __create_write_items__(self, fqn: str, _: Any) -> Any:
        return self.source.__create_write_items__(fqn, self.source)

    def __create_chunk_list__(self) -> Any:
        return self.source.__create_chunk_list__()


def _gather(value: Any, parallel: Parallel, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return parallel.gather_objects(value)
    gathered: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _tensors(engine: Engine, projector: GraspProjector | None) -> dict[str, Tensor]:
    """Everything that is saved, by name, sharing memory with what it is taken from; nothing without numbers."""
    tensors: dict[str, Tensor] = dict(engine.pieces())
    if projector is not None:
        tensors |= {f"pins.{name}": value for name, value in projector.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def _shapes(tensors: dict[str, Tensor], engine: Engine) -> dict[str, tuple[int, ...]]:
    """Logical shapes: pieces are flat."""
    logical = engine.shapes()
    shapes = {}
    for name, tensor in tensors.items():
        shape = logical.get(name.split(".", 2)[2] if name.startswith("optimizer.") else name.partition(".")[2])
        same = isinstance(tensor, FlatPiece) and shape is not None and tensor.numel() == torch.Size(shape).numel()
        shapes[name] = shape if same and shape is not None else tuple(tensor.shape)
    return shapes


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FlatPiece):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check_same(
    record: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    tensors: dict[str, Tensor],
    basis: str | None,
    folder: Path,
) -> None:
    own = {name: [list(shape), str(tensors[name].dtype).removeprefix("torch.")] for name, shape in shapes.items()}
    saved = {name: [entry["shape"], entry["dtype"]] for name, entry in record["tensors"].items()}
    differing = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    if differing:
        name = differing[0]
        theirs, ours = (" ".join(map(str, found[name])) if name in found else "nothing" for found in (saved, own))
        raise InputError(
            f"{folder} has {theirs} for {name!r}, and this run {ours} ({len(differing)} such); continue with the "
            "model, modules, rank, precision and basis that it was made with"
        )
    if record["basis"] != basis:
        raise InputError(
            f"{folder} was made with another basis than this run's, so its pins do not fit; continue with the basis "
            "that it was made with, or start again in another folder"
        )


def _cause(error: BaseException) -> Exception:
    """What the ranks' errors come to, which torch.distributed.checkpoint wraps in what is no `Exception`."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        first = next(iter(failures.values()))
        found = first[0] if isinstance(first, tuple) else first
        if isinstance(found, Exception):
            return found
    return error if isinstance(error, Exception) else RuntimeError(str(error))


@contextmanager
def _quiet() -> Iterator[None]:
    # A single process needs no process group, which torch finds worth a warning.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
