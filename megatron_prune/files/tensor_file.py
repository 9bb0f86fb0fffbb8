"""Safetensors files: from outside, a tensor is of the dtype, the shape and the kind of numbers that are needed, or refused."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.errors import CheckpointError, InputError, reason
from megatron_prune.files.documents import open_regular

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def require_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Refuse to keep numbers that are none: whoever goes on from them would not get further.

    Raises:
        InputError: naming the tensors.
    """
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        do = "look for broken weights with megatron-prune inspect --weights, or compute with --dtype fp32"
        raise InputError(f"{what} is not finite (NaN or infinity)", got=", ".join(broken), do=do)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file, readable for whom any new file is: ``save_file`` alone makes one for its owner, whatever the umask says."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    path.chmod(mode)


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorFile:
    """An opened file.

    Attributes:
        names: of its tensors.
        metadata: texts by name.
    """

    path: Path
    names: list[str]
    metadata: dict[str, str]
    _file: Any
    _error: type[InputError]
    _do: str | None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read.

        Raises:
            InputError: if there is none of that name.
        """
        if name not in self.names:
            raise self._error(f"{self.path} lacks the tensor {name!r}", do=self._do)
        return tuple(self._file.get_slice(name).get_shape())

    def read(
        self, name: str, dtype: torch.dtype, shape: tuple[int | None, ...], *, finite: bool = True, least: float | None = None
    ) -> Tensor:
        """A tensor.

        Args:
            shape: what it must have; ``None`` takes any size.
            finite: refuse NaN and infinity.
            least: refuse smaller values.

        Raises:
            InputError: if it is missing or something else, naming it.
        """
        held = self.shape(name)
        kind = self._file.get_slice(name).get_dtype()
        if _DTYPES.get(kind) is not dtype or len(held) != len(shape) or any(n not in (None, s) for s, n in zip(held, shape)):
            asked = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.refuse(name, got=f"{_DTYPES.get(kind, kind)} {list(held)}", needed=f"{dtype} [{asked}]")
        found = self.take(name)
        if dtype.is_floating_point and finite and not bool(found.isfinite().all()):
            raise self.refuse(name, got="NaN or infinity", needed="finite numbers")
        if least is not None and found.numel() and float(found.min()) < least:
            raise self.refuse(name, got=float(found.min()), needed=f"at least {least:g}")
        return found

    def take(self, name: str) -> Tensor:
        """A tensor, whatever it is."""
        with self._readable():
            return self._file.get_tensor(name)

    def refuse(self, name: str, *, got: object, needed: object) -> InputError:
        """The error that says what a tensor is and should be."""
        return self._error(f"{self.path}: tensor {name!r}", got=got, needed=needed, do=self._do)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        with _readable(self.path, self._error, self._do):
            yield


@contextlib.contextmanager
def open_tensors(path: Path, *, error: type[InputError] = CheckpointError, do: str | None = None) -> Iterator[TensorFile]:
    """Open a file to read.

    Args:
        error: what is raised.
        do: what the user can do about a damaged file.

    Raises:
        InputError (of the kind ``error``): if it is missing, no regular file, or no whole safetensors file.
    """
    open_regular(path, error=error).close()  # a pipe or a device would be waited for
    with contextlib.ExitStack() as stack:
        with _readable(path, error, do):
            file = stack.enter_context(safe_open(path, framework="pt"))
            names, metadata = list(file.keys()), dict(file.metadata() or {})
        yield TensorFile(path=path, names=names, metadata=metadata, _file=file, _error=error, _do=do)


@contextlib.contextmanager
def _readable(path: Path, error: type[InputError], do: str | None) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as found:
        raise error(f"{path} is not a whole safetensors file", got=reason(found), do=do) from None
