"""A rank's piece of a tensor, flat: the one form in which weights and moments are saved and read.

`fully_shard` cuts rows, ZeRO cuts anywhere; either way a rank holds a run start:stop of the row-major flattened tensor.
As pieces of 1-D tensors they are saved, deduplicated and resharded by torch.distributed.checkpoint, whatever engine and
world size wrote them, and whichever reads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

__all__ = ["FlatPiece", "piece_of"]


class FlatPiece(Tensor):
    """Numbers start : start + len(local) of a flat tensor of `numel` numbers, for torch.distributed.checkpoint alone.

    `local`, 1-D and maybe empty, shares memory with what it was made from: reading a checkpoint fills it.
    """

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, start: int, numel: int) -> FlatPiece:
        assert local.ndim == 1
        assert 0 <= start <= start + local.numel() <= numel
        self = Tensor._make_wrapper_subclass(cls, (numel,), dtype=local.dtype, device=local.device)  # type: ignore[attr-defined]
        self.local, self.start = local.detach(), start
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        stop = self.start + self.local.numel()
        return f"FlatPiece({self.start}:{stop} of {self.shape[0]}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            (piece,) = args
            return cls(piece.local, piece.start, piece.shape[0])
        raise NotImplementedError(f"{func} of a FlatPiece; use its `local`")

    def like(self, local: Tensor) -> FlatPiece:
        """The same place with other numbers."""
        return FlatPiece(local, self.start, self.shape[0])

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=torch.Size([self.local.numel()]))

    # What torch.distributed.checkpoint asks of a sharded tensor.

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        if not self.local.numel():
            return []
        chunk = self._chunk()
        data = TensorWriteData(
            chunk=chunk, properties=TensorProperties.create_from_tensor(self.local), size=torch.Size(self.shape)
        )
        return [WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.local.numel() else []

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.local


def piece_of(tensor: Tensor) -> FlatPiece:
    """This rank's piece of a plain tensor (all of it), or of a DTensor whose rows are cut, as by `fully_shard`."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return FlatPiece(tensor.view(-1), 0, tensor.numel())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.to_local()
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert local.shape[1:] == tensor.shape[1:], "only rows may be cut"
    width = math.prod(tensor.shape[1:])
    return FlatPiece(local.view(-1), min(offsets[0], tensor.shape[0]) * width, tensor.numel())
