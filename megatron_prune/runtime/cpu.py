"""megatron-core on a machine without CUDA: the places that name the device ``cuda`` are given the CPU instead.

megatron-core 0.16.1 writes ``device='cuda'``, ``Tensor.cuda()``, ``torch.cuda.current_device()`` and
``torch.cuda.synchronize()`` in its schedules, rotary embedding, mappings, optimizer and writers, compares
``Tensor.type()`` with ``'torch.cuda.FloatTensor'``, and tracks the state of CUDA's random numbers. Inside
:func:`stand_in` these mean the CPU. With CUDA present it does nothing.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Iterator
from unittest import mock

import torch
from megatron.core.tensor_parallel import random as core_random
from torch.overrides import TorchFunctionMode


class _OnCpu(TorchFunctionMode):
    """Rewrites a CUDA device in the arguments of torch's functions."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1:
            return function(*args, **kwargs).replace("torch.", "torch.cuda.")
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if function is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return function(*args, **kwargs)


def _names_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Let ``cuda`` mean the CPU where there is no CUDA."""
    if torch.cuda.is_available():
        yield
        return
    tracker_log = logging.getLogger(core_random.__name__)  # it warns of every change of the CPU's state, which is the one here
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        mock.patch.object(torch.cuda, "manual_seed", torch.default_generator.manual_seed),
        mock.patch.object(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        mock.patch.object(core_random, "_get_cuda_rng_state", lambda **_: torch.get_rng_state()),
        mock.patch.object(core_random, "_set_cuda_rng_state", lambda state, **_: torch.set_rng_state(state)),
        mock.patch.object(tracker_log, "level", logging.ERROR),
        _OnCpu(),
    ):
        yield
