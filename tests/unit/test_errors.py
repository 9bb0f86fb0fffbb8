"""What other libraries say is passed on plain: no terminal codes, none of their advice, not longer than a line."""

from __future__ import annotations

import os

import pytest

from megatron_prune.cli.main import DEBUG, main, unexpected
from megatron_prune.errors import InputError, plain, reason
from megatron_prune.runtime.world import World

TORCH = """Weights only load failed. In PyTorch 2.6, we changed the default value of the `weights_only` argument in `torch.load` from \
`False` to `True`. Re-running `torch.load` with `weights_only` set to `False` will likely succeed, but it can result in arbitrary code \
execution. Do it only if you got the file from a trusted source.
Please file an issue with the following so that we can make `weights_only=True` compatible: WeightsUnpickler error: \x1b[31mUnsupported\x1b[0m
operand 149

Check the documentation of torch.load to learn more about types accepted by default."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(TORCH), "RuntimeError: operand 149"),
        (ValueError("\x1b[1;31mred\x1b[0m and \x07bell"), "ValueError: red and ?bell"),
        (ValueError("The repository x contains custom code. Please pass the argument `trust_remote_code=True`."), None),
        (KeyError("family"), "KeyError: 'family'"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory"),
        (ValueError("x" * 5000), "ValueError: " + "x" * 187 + "…"),
        (InputError("the file is wrong", got=3), "the file is wrong"),
    ],
)
def test_a_foreign_error_in_one_plain_line(error, said):
    found = reason(error)
    assert found == (said or found)
    assert len(found) <= 200 and found.isprintable()
    assert not any(word in found for word in ("weights_only", "trust_remote_code", "\x1b", "arbitrary"))


def test_plain_keeps_lines_and_cuts():
    assert plain("a\n\x1b]0;title\x07b\tc\x1b[2J", 100) == "a\nb?c"
    assert plain("x" * 30, 10) == "x" * 9 + "…"
    assert "\x1b" not in str(InputError("a\x1b[31m", got="\x1b[0mb"))


def test_what_nobody_foresaw_is_a_message(monkeypatch, capsys):
    def fails(*_):
        raise IndexError("list index out of range")

    monkeypatch.setattr("megatron_prune.opening.opened.open_either", fails)
    with pytest.raises(SystemExit) as end:
        main(["inspect", "x"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" not in said
    assert "did not foresee\n  got: IndexError: list index out of range, at unit/test_errors.py:" in said and DEBUG in said
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(SystemExit):
        main(["inspect", "x"])
    assert "Traceback" in capsys.readouterr().err


def test_memory_is_named():
    assert unexpected(MemoryError()).startswith("not enough memory\n  got: MemoryError")
    assert "not enough memory" in unexpected(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")
    )


@pytest.mark.parametrize(
    "wrong", [{"RANK": "x"}, {"RANK": "-1"}, {"WORLD_SIZE": "1.5"}, {"LOCAL_RANK": ""}, {"RANK": "3", "WORLD_SIZE": "2"}]
)
def test_a_world_that_cannot_be(monkeypatch, wrong, capsys):
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=next(iter(wrong))):
        World.of_environment()
    with pytest.raises(SystemExit) as end:
        main(["inspect", os.devnull])
    assert end.value.code == 2 and "environment variable" in capsys.readouterr().err
