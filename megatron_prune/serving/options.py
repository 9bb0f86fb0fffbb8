"""What is asked of a shape for the place where it is served."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_prune.config import option
from megatron_prune.errors import InputError
from megatron_prune.serving.runtime import RUNTIMES


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where the model is to be served."""

    serve: str | None = option(
        "take only shapes that can be served so: runtimes (vllm, llamacpp, transformers, transformers4) that are to load the "
        "family that is written, and tensor-parallel sizes over which it is to divide, such as vllm,tp=4,8",
        None,
        group="shape",
    )


def parse_serve(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """``"vllm,tp=4,8"`` → (names of runtimes, tensor-parallel sizes).

    Raises:
        InputError: on a word that is neither.
    """
    runtimes, sizes, counting = [], [], False
    for word in text.replace(" ", "").split(","):
        number = re.fullmatch("(tp=)?([1-9][0-9]{0,4})", word)
        if number and (number[1] or counting):
            sizes.append(int(number[2]))
            counting = True
        elif word in RUNTIMES.names():
            runtimes.append(word)
            counting = False
        else:
            needed = f"{', '.join(RUNTIMES.names())}, or tp= and the tensor-parallel sizes, such as vllm,tp=4,8"
            raise InputError(f"--serve {text[:80]}", got=repr(word[:40]), needed=needed)
    return tuple(dict.fromkeys(runtimes)), tuple(dict.fromkeys(sizes))
