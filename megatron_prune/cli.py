"""``megatron-prune <verb>``: parse, run one step, turn errors into messages and exit codes.

Exit codes: 0 done; 1 a check failed or something broke; 2 bad input, with nothing written.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from megatron_prune import __version__
from megatron_prune.config import parse
from megatron_prune.errors import InputError, PruneError, plain, reason
from megatron_prune.files.failures import describe

DEBUG = "MEGATRON_PRUNE_DEBUG"
"""Environment variable: set to anything, what was not foreseen ends with its traceback."""

VERBS = {
    "convert": "Hugging Face → Megatron",
    "export": "Megatron → Hugging Face",
    "transfer": "change TP, PP, format or dtype of a Megatron checkpoint",
    "verify": "compare logits of a Megatron checkpoint under TP with the Hugging Face model",
    "sample": "text that a model makes itself, kept as calibration data",
    "score": "measure a Megatron checkpoint on text and keep the scores of every axis",
    "prune": "score, plan and cut a Megatron checkpoint",
    "prune-hf": "the same cuts on a Hugging Face model, single process, without Megatron",
    "preprocess": "text → Megatron .bin/.idx pairs, to train on",
    "teach": "a teacher's most probable tokens, kept for distilling without it",
    "recover": "train a pruned Megatron checkpoint: plain, distilled, or adapters alone",
    "vocab count": "a corpus → how often it uses every token",
    "vocab select": "counts → the tokens that stay: a report and a plan",
    "vocab trim": "cut the vocabulary of a model of either kind, its tokenizer with it",
    "vocab remap": "tokenised data (.bin/.idx) → the same for a trimmed vocabulary",
    "evaluate": "perplexity of a Megatron checkpoint under TP × PP",
    "compare": "before/after table of two Hugging Face models",
    "inspect": "shape, layout, parameters, bytes, recipe of a checkpoint; its broken weights",
    "estimate": "memory per rank and disk of a conversion, every part of a pruning, and a recovery",
}
"""verb → one line of help; the module and the function of that name in ``steps/`` run it."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``megatron-prune`` and ``python -m megatron_prune``."""
    argv = sys.argv[1:] if argv is None else argv
    _encodable()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    if argv[0] in ("-V", "--version"):
        print(f"megatron-prune {__version__}")
        return
    if " ".join(argv[:2]) in VERBS:  # verbs of two words
        argv = [" ".join(argv[:2]), *argv[2:]]
    if argv[0] not in VERBS:
        print(f"megatron-prune: unknown verb {argv[0]!r}\n\n{_usage()}", file=sys.stderr)
        raise SystemExit(2)
    run_verb(argv[0], argv[1:], prog=f"megatron-prune {argv[0]}")


def run_verb(verb: str, argv: list[str], *, prog: str) -> None:
    """Parse ``argv`` for ``verb``, run it on all processes, and exit with its code if it is not 0."""
    from megatron_prune.runtime.world import World

    _quiet()
    world = World()
    try:
        world = World.of_environment()
        name = verb.replace("-", "_").replace(" ", "_")
        step = importlib.import_module(f"megatron_prune.steps.{name}")
        parser = getattr(step, "parse", None)
        kind = getattr(step, "".join(part.capitalize() for part in name.split("_")) + "Options")
        options = parser(argv, prog) if parser else parse(kind, argv, prog=prog, description=kind.__doc__)
        code = getattr(step, name)(options, world)
        world.disconnect()
    except InputError as error:
        _fail(world, f"{prog}: {error}", 2)
    except PruneError as error:
        _fail(world, f"{prog}: {error}", 1)
    except KeyboardInterrupt:
        _fail(world, f"{prog}: interrupted", 130)
    except OSError as error:  # before work: what is refused while something is written is a PruneError
        _fail(world, f"{prog}: {describe(error)}", 2)
    except SystemExit:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        _fail(world, f"{prog}: {unexpected(error)}", 1)
    if code:
        raise SystemExit(code)


def unexpected(error: BaseException) -> str:
    """The message for what nobody thought of; the traceback only where :data:`DEBUG` is set."""
    if os.environ.get(DEBUG):
        return "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"not enough memory\n  got: {reason(error)}\n  what to do: take more ranks, shorter or fewer samples, or a larger machine"
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = os.path.join(*Path(last.filename).parts[-2:])
    return (
        f"something went wrong that this program did not foresee\n  got: {reason(error)}, at {where}:{last.lineno}\n"
        f"  what to do: see whether the input is sound; if it is, this is a fault of megatron-prune: please report it with what "
        f"{DEBUG}=1 prints"
    )


def _encodable() -> None:
    """What the encoding of the output lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quiet() -> None:
    """Our own messages on standard error; the libraries' notices about what is not installed are left out."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    own = logging.getLogger("megatron_prune")
    own.handlers, own.propagate = [handler], False
    own.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed|torch\.nn\.parallel)")
    warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine|transformer_engine|barrier\(\)|not a leaf Tensor).*")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:Apex is not,ignore:Transformer Engine and Apex")  # processes that it spawns
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _fail(world, message: str, code: int) -> None:
    """Print and leave at once. Bad input is seen alike by all ranks: the others give rank 0 time to say it alone."""
    if world.size > 1:
        if not world.is_main:
            time.sleep(10.0)  # torchrun ends this process as soon as another has failed
        message = "\n".join(f"[rank {world.rank}] {line}" for line in message.split("\n"))
    print(plain(message, 1 << 20), file=sys.stderr, flush=True)
    if world.size > 1:
        os._exit(code)  # a process group with dead peers must not be torn down politely: that can hang
    raise SystemExit(code)


def _usage() -> str:
    lines = ["usage: megatron-prune <verb> [options]      megatron-prune <verb> --help", ""]
    lines += [f"  {verb:12} {text}" for verb, text in VERBS.items()]
    lines += ["", "Under torchrun: torchrun --nproc-per-node N -m megatron_prune <verb> [options]"]
    return "\n".join(lines)
