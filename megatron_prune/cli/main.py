"""``megatron-prune <verb>``: parse, run one step, turn errors into messages and exit codes.

Exit codes: 0 done; 1 a check failed or something broke; 2 bad input, with nothing written.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prune import __version__
from megatron_prune.api import run
from megatron_prune.cli import usage
from megatron_prune.cli.config_file import named_files, set_defaults, text_of
from megatron_prune.cli.ending import Ending
from megatron_prune.cli.parser import made, parser_of
from megatron_prune.errors import InputError, PruneError, plain, reason
from megatron_prune.files.failures import describe
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.verbs.table import VERBS, options_of

DEBUG = "MEGATRON_PRUNE_DEBUG"
"""Environment variable: set to anything, what was not foreseen ends with its traceback."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``megatron-prune`` and ``python -m megatron_prune``."""
    argv = sys.argv[1:] if argv is None else argv
    _encodable()
    if not argv:
        print(usage.overview(), file=sys.stderr)
        raise SystemExit(2)
    if argv[0] == "help" and len(argv) > 1:  # help VERB, as VERB --help
        argv = [*argv[1:], "--help"]
    if argv[0] in ("-h", "--help", "help"):
        print(usage.overview())
        return
    if argv[0] in ("-V", "--version"):
        print(f"megatron-prune {__version__}")
        return
    if argv[0] == "completion":
        _completion(argv[1:])
        return
    if " ".join(argv[:2]) in VERBS:  # verbs of two words
        argv = [" ".join(argv[:2]), *argv[2:]]
    elif prefixed := [verb for verb in VERBS if verb.startswith(f"{argv[0]} ")]:
        if set(argv[1:]) & {"-h", "--help"} and argv[1].startswith("-"):
            print(usage.overview(prefixed))
            return
    if argv[0] not in VERBS:
        print(f"megatron-prune: {usage.unknown(argv)}", file=sys.stderr)
        raise SystemExit(2)
    run_verb(argv[0], argv[1:], prog=f"megatron-prune {argv[0]}")


def run_verb(verb: str, argv: list[str], *, prog: str) -> None:
    """Parse ``argv`` for ``verb``, run it on all processes, and exit with its code if it is not 0."""
    world = World()
    try:
        world = World.of_environment()
        options, manner = _read(verb, argv, prog, world)
        _speak(manner)
        ending = Ending(verb, options, world)
        found = run(verb, options, world)
        code = found if isinstance(found, int) else 0
        world.disconnect()
        if not code:
            ending.say()
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


def guarded(work: Callable[[], None], prog: str) -> None:
    """Run what a script of ours does beside verbs: its errors are messages with the same exit codes."""
    try:
        work()
    except PruneError as error:
        print(plain(f"{prog}: {error}", 1 << 20), file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None


def _read(verb: str, argv: list[str], prog: str, world: World) -> tuple[Any, Any]:
    """The options of a verb, and what was said of the manner (``quiet``, ``verbose``); help and print-config end the process."""
    kind = options_of(verb)
    parser = parser_of(kind, prog)
    if not world.is_main and {"-h", "--help"} & set(argv):
        raise SystemExit(0)  # one help is enough
    for path in named_files(argv):
        set_defaults(parser, path)
    namespace = parser.parse_args(argv)
    if namespace.print_config:
        if world.is_main:
            print(text_of(kind, namespace, verb), end="")
        raise SystemExit(0)
    if namespace.quiet and namespace.verbose:
        raise InputError("--quiet and --verbose", needed="one of the two")
    return made(kind, namespace), namespace


def _completion(argv: list[str]) -> None:
    from megatron_prune.cli.completion import SHELLS, script

    if len(argv) != 1 or argv[0] not in SHELLS:
        print(f"usage: megatron-prune completion {{{','.join(SHELLS)}}}", file=sys.stderr if argv != ["--help"] else sys.stdout)
        raise SystemExit(0 if argv == ["--help"] else 2)
    print(script(argv[0]))


def unexpected(error: BaseException) -> str:
    """The message for what nobody thought of; the traceback only where :data:`DEBUG` is set."""
    if os.environ.get(DEBUG) or log.isEnabledFor(logging.DEBUG):
        return "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"not enough memory\n  got: {reason(error)}\n  what to do: take more ranks, shorter or fewer samples, or a larger machine"
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = os.path.join(*Path(last.filename).parts[-2:])
    return (
        f"something went wrong that this program did not foresee\n  got: {reason(error)}, at {where}:{last.lineno}\n"
        f"  what to do: see whether the input is sound; if it is, this is a fault of megatron-prune: please report it with what "
        f"{DEBUG}=1 (or --verbose) prints"
    )


def _encodable() -> None:
    """What the encoding of the output lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _speak(manner: Any) -> None:
    """Our own messages on standard error, as many as were asked for."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.WARNING if manner.quiet else logging.DEBUG if manner.verbose else logging.INFO)


def _fail(world: World, message: str, code: int) -> None:
    """Print and leave at once. Bad input is seen alike by all ranks: the others give rank 0 time to say it alone."""
    if world.size > 1:
        if not world.is_main:
            time.sleep(10.0)  # torchrun ends this process as soon as another has failed
        message = "\n".join(f"[rank {world.rank}] {line}" for line in message.split("\n"))
    print(plain(message, 1 << 20), file=sys.stderr, flush=True)
    if world.size > 1:
        os._exit(code)  # a process group with dead peers must not be torn down politely: that can hang
    raise SystemExit(code)
