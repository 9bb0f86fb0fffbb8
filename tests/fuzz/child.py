"""The command line in a process of its own with limits of time and memory: what it said and how it ended.

It is forked from one that has only imported: threads that other tests have left in this one are not there.
"""

from __future__ import annotations

import os
import resource
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path

from ranks import forking_context

SECONDS, BYTES = 120, 8 << 30
"""What a command may take: by the clock, with other work on the machine; of memory that it writes to."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, negative for a signal, ``None`` if it had to be ended; and what it printed."""

    code: int | None
    said: str


def run(words: list[str], folder: Path, *, seconds: float = SECONDS) -> Ended:
    """Run ``megatron-prune`` with these words in ``folder``."""
    output = folder.with_name(f"{folder.name}.log")
    process = forking_context().Process(target=_become, args=(words, folder, output))
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return Ended(None, output.read_text(errors="replace"))
    return Ended(process.exitcode, output.read_text(errors="replace"))


def _become(words: list[str], folder: Path, output: Path) -> None:
    code = 99
    try:
        os.setsid()
        number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((null, 0), (number, 1), (number, 2)):
            os.dup2(old, new)
        import sys

        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from megatron_prune.cli.main import main

        code = 0
        main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException:
        traceback.print_exc()
        code = 97
    finally:
        import sys

        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
