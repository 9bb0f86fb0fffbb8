"""A shell's completion of verbs, flags and the values that can be listed."""

from __future__ import annotations

import argparse

import shtab

from megatron_prune.cli.parser import Parser, add_options
from megatron_prune.verbs.table import VERBS, options_of

SHELLS = shtab.SUPPORTED_SHELLS


def script(shell: str) -> str:
    """The script that a shell evaluates."""
    root = argparse.ArgumentParser(prog="megatron-prune")
    kinds = root.add_subparsers(parser_class=Parser)
    groups: dict[str, argparse._SubParsersAction] = {}
    for verb, text in VERBS.items():
        first, _, second = verb.partition(" ")
        if second and first not in groups:
            groups[first] = kinds.add_parser(first, help=f"verbs of {first}").add_subparsers(parser_class=Parser)
        where = groups[first] if second else kinds
        parser = where.add_parser(second or first, help=text)
        add_options(parser, options_of(verb))
        for action in parser._actions:
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE
    return shtab.complete(root, shell)
