"""The processes of this run, as torchrun started them. torch is imported when they first speak to each other: a message about a
bad command line need not wait for it."""

from __future__ import annotations

import datetime
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable

from megatron_prune.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all of them. A plain ``python`` run is a world of one, without a process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> World:
        """Read torchrun's variables; starts nothing.

        Raises:
            InputError: if one is no number, or the rank is none of the world.
        """
        found = {
            name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        }
        for name, text in found.items():
            if not re.fullmatch(r"[0-9]{1,9}", text):
                raise InputError(f"the environment variable {name}", got=repr(text), needed="a number, as torchrun sets it")
        rank, size, local = (int(text) for text in found.values())
        if rank >= size:
            raise InputError(
                "the environment variables RANK and WORLD_SIZE", got=f"{rank} of {size}", needed="a rank below the size"
            )
        return cls(rank, size, local)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all (prints, writes manifests)."""
        return self.rank == 0

    def connect(self, *, always: bool = False) -> None:
        """Start the process group, if it is not yet: gloo for host memory, NCCL beside it where there is CUDA.

        Args:
            always: also for a world of one (megatron-core needs a group).
        """
        import torch
        import torch.distributed as dist

        if dist.is_initialized() or (self.size == 1 and not always):
            return
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0" if self.size == 1 else "29500")
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=datetime.timedelta(minutes=30))

    def barrier(self) -> None:
        """Wait for every process."""
        self.all_gather(None)

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank."""
        if self.size == 1:
            return [value]
        self.connect()
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def agree(self, error: Exception | None) -> None:
        """Raise what the first process of those that found something wrong found, on every process alike."""
        for found in self.all_gather(error):
            if found is not None:
                raise found

    def on_main(self, action: Callable[[], object]) -> None:
        """Do something on the main process; the others wait, and what it raises there is raised on all of them."""
        error = None
        if self.is_main:
            try:
                action()
            except Exception as found:
                error = found
        self.agree(error)

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """The main process's tensor on the host, written into those of all others, which have its shape and dtype.

        All are contiguous: memory is what is sent, whatever its order.
        """
        assert value.is_contiguous()
        if self.size > 1:
            import torch.distributed as dist

            self.connect()
            dist.broadcast(value, 0)
        return value

    def disconnect(self) -> None:
        """Leave the process group, if one was started."""
        if "torch" not in sys.modules:
            return
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
