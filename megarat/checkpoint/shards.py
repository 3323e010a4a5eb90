"""Fragments of logical tensors as ``torch.distributed.checkpoint`` sees them: every rank writes its boxes and reads what its boxes need.

The format on disk is that of whole tensors: names, global shapes, and for each a set of boxes that covers it. A reader finds the boxes
that overlap its own, whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megarat.parallel.fragments import Fragments


class Cast(NamedTuple):
    """This rank's part of a tensor, to be written as ``dtype``: each box is rounded when its turn comes, by the thread that writes it."""

    fragments: Fragments
    dtype: torch.dtype


Held = Tensor | Fragments | Cast  # a whole tensor, or this rank's part of one


class _Shards:
    """Answers the questions that the planners ask of a tensor spread over ranks."""

    def __init__(self, fragments: Fragments, dtype: torch.dtype) -> None:
        self._fragments, self._dtype = fragments, dtype

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        if not self._fragments.written_here:
            return []
        whole = torch.Size(self._fragments.whole)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self._dtype), whole),
            )
            for number, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), tensor.shape) for offset, tensor in self._fragments.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The box itself, for a reader to fill, unless it is to be cast."""
        return next(tensor for offset, tensor in self._fragments.boxes if offset == index.offset).to(self._dtype)


class SavePlanner(DefaultSavePlanner):
    """torch's planner, which looks boxes up in tensors only."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The box or tensor that a write item names."""
        held = self.state_dict[index.fqn]
        return held.__get_tensor_shard__(index) if isinstance(held, _Shards) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """torch's planner, likewise."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Keep what is no tensor, which torch would replace by nothing."""
        super().set_up_planner({}, metadata, is_coordinator)
        self.state_dict = state_dict

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The box or tensor that a read item fills."""
        held = self.state_dict[index.fqn]
        return held.__get_tensor_shard__(index) if isinstance(held, _Shards) else super().lookup_tensor(index)


def as_state_dict(tensors: Mapping[str, Held]) -> dict[str, Any]:
    """For ``torch.distributed.checkpoint`` with the planners of this module."""
    return {name: held if isinstance(held, Tensor) else _shards(held) for name, held in tensors.items()}


def _shards(held: Fragments | Cast) -> _Shards:
    return _Shards(*held) if isinstance(held, Cast) else _Shards(held, held.dtype)


def bytes_held(tensors: Mapping[str, Held]) -> int:
    """Size on disk of what this rank holds."""
    return sum(map(_bytes, tensors.values()))


def _bytes(held: Held) -> int:
    if isinstance(held, Tensor):
        return held.nbytes
    fragments, dtype = held if isinstance(held, Cast) else (held, held.dtype)
    return sum(box.numel() for _, box in fragments.boxes) * dtype.itemsize
