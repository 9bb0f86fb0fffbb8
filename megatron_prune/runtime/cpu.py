"""megatron-core on a machine without CUDA: the places that name the device ``cuda`` are given the CPU instead.

megatron-core 0.16.1 writes ``device='cuda'``, ``Tensor.cuda()``, ``torch.cuda.current_device()`` and
``torch.cuda.synchronize()`` in its schedules, rotary embedding, mappings, optimizer and writers, compares
``Tensor.type()`` with ``'torch.cuda.FloatTensor'``, and tracks the state of CUDA's random numbers. Inside
:func:`stand_in` these mean the CPU. With CUDA present it does nothing.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
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


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective of megatron-core's buffers, left out in a group of one, where what goes in is what comes out.

    Their input and output are then the same memory; gloo would copy it to itself, twice, in every step.
    """

    def call(output: torch.Tensor, given: torch.Tensor, *, group: dist.ProcessGroup, **rest: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == given.data_ptr():
            return None
        return collective(output, given, group=group, **rest)

    return call


def _scale(chunk: int, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], factor: float) -> None:
    """``amp_C.multi_tensor_scale`` of gradients onto themselves, in place; megatron-core's own makes a copy of each."""
    for source, target in zip(*tensors):
        torch.mul(source, factor, out=target)


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Let ``cuda`` mean the CPU where there is no CUDA."""
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.distributed import param_and_grad_buffer  # not at import: it takes seconds, and starts threads
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random as core_random

    tracker_log = logging.getLogger(core_random.__name__)  # it warns of every change of the CPU's state, which is the one here
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        mock.patch.object(torch.cuda, "manual_seed", torch.default_generator.manual_seed),
        mock.patch.object(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        mock.patch.object(core_random, "_get_cuda_rng_state", lambda **_: torch.get_rng_state()),
        mock.patch.object(core_random, "_set_cuda_rng_state", lambda state, **_: torch.set_rng_state(state)),
        mock.patch.object(param_and_grad_buffer, "dist_reduce_scatter_func", _unless_alone(dist.reduce_scatter_tensor)),
        mock.patch.object(param_and_grad_buffer, "dist_all_gather_func", _unless_alone(dist.all_gather_into_tensor)),
        mock.patch.object(clip_grads, "multi_tensor_scale_impl", _scale),
        mock.patch.object(tracker_log, "level", logging.ERROR),
        _OnCpu(),
    ):
        yield
