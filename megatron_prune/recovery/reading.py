"""What megatron-core reads of a run's checkpoint, read for it: nothing of the files reaches a pickle of Python's or torch's.

megatron-core 0.16.1 and torch unpickle ``.metadata``, ``common.pt`` and every object in the ``.distcp`` files. Here they are
interpreted (``files/pickled.py``), and megatron-core is handed the values: plain ones, and tensors whose bytes are read.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from megatron_prune.checkpoint import torch_archive, torch_dist
from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import shorten


def load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``dist_checkpointing.load``, of what is proven harmless alone.

    Raises:
        CheckpointError: naming the file that holds something else than tensors and plain values.
    """
    torch_dist.read_stored(folder)  # there, and of this kind
    with mock.patch.object(torch_strategies, "_get_filesystem_reader", lambda path, cache_metadata=False: _Reader(path)):
        return dist_checkpointing.load(wanted, str(folder), common_strategy=_Common())


class _Common(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: str) -> dict[str, Any]:
        path = Path(checkpoint_dir) / torch_dist.COMMON
        stored = torch_archive.read_objects(path)
        if not isinstance(stored, dict):
            raise CheckpointError(f"{path}", got=shorten(stored), needed="a dictionary")
        return {key: _plain(value, path) for key, value in stored.items() if key != "args"}


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        found = torch_dist.read_metadata(Path(self.path))
        return Metadata(
            state_dict_metadata=found.state_dict_metadata,
            storage_data=found.storage_data,
            storage_meta=StorageMeta(load_id=self.load_id),
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            path = Path(self.path) / info.relative_path
            stored = torch_archive.read_objects(path, offset=info.offset, length=info.length)
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, _encoded(_object(item.storage_index.fqn, stored, path)))
                continue
            target = planner.resolve_tensor(item).detach()
            part = narrow_tensor_by_index(_read(stored, path), item.storage_offsets, item.lengths)
            if part.shape != target.shape:
                raise CheckpointError(f"{path}: {item.storage_index.fqn}", got=tuple(part.shape), needed=tuple(target.shape))
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _object(name: str, stored: Any, path: Path) -> Any:
    """What is handed on of a stored object.

    Of FP8's ``_extra_state`` nothing is: no run trains with it, and Transformer Engine would unpickle it from a tensor.
    """
    if not isinstance(stored, list):
        raise CheckpointError(f"{path}: {name}", got=shorten(stored), needed="a list, one of each shard")
    return [None] * len(stored) if "_extra_state" in name else _plain(stored, path)


def _plain(value: Any, path: Path) -> Any:
    """``value`` with tensors read, if it is of tensors and plain values alone."""
    if isinstance(value, torch.Tensor):
        return _read(value, path)
    if isinstance(value, dict):
        return {_plain(key, path): _plain(each, path) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each, path) for each in value)
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise CheckpointError(f"{path} holds what no run's state does", got=shorten(value), needed="tensors and plain values")


def _read(stored: Any, path: Path) -> torch.Tensor:
    """The values of a tensor on ``meta`` that stands for bytes in ``path``."""
    if not isinstance(stored, torch.Tensor):
        raise CheckpointError(f"{path}", got=f"a {type(stored).__name__}", needed="a tensor")
    region = torch_archive.region_of(stored, path)
    values = torch.empty(region.rows, region.cols, dtype=region.dtype)
    region.read_into(values)
    return values.view(stored.shape)


def _encoded(value: Any) -> io.BytesIO:
    """``value`` as torch's planner takes it: it is plain, so what torch unpickles is what was written here."""
    memory = io.BytesIO()
    torch.save(value, memory)
    memory.seek(0)
    return memory
