"""Pages of the site that are not files of ``docs/``: README, CHANGELOG and CONTRIBUTING, and the command line out of its own parsers.

A hook of mkdocs (``mkdocs.yml``); ``make docs``.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_prune.cli.parser import parser_of
from megatron_prune.verbs.table import VERBS, options_of

OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository → their names on the site."""


def on_files(files: Any, config: Any) -> Any:
    """Put the pages in."""
    from mkdocs.structure.files import File

    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in OUTSIDE.items()}
    pages["verbs.md"] = overview()
    pages |= {page_of(verb): verb_page(verb) for verb in VERBS}
    for name, text in pages.items():
        page = File.generated(config, name, content=text)
        if name.startswith("verbs/"):  # reached from verbs.md
            page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links between the repository's files as links between pages; to what is no page, as its name."""

    def moved(found: re.Match) -> str:
        text, target = found.groups()
        target = target.removeprefix("../").removeprefix("docs/")
        name, _, anchor = target.partition("#")
        if "://" in target or name in ("", *OUTSIDE.values()) or not name:
            return found.group()
        if name in OUTSIDE:
            return f"[{text}]({OUTSIDE[name]}{'#' + anchor if anchor else ''})"
        return f"[{text}]({target})" if name.endswith(".md") else text

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", moved, markdown)


def page_of(verb: str) -> str:
    """Name of a verb's page."""
    return f"verbs/{verb.replace(' ', '-')}.md"


def overview() -> str:
    """All verbs."""
    rows = [f"| [`{verb}`]({page_of(verb)}) | {said} |" for verb, said in VERBS.items()]
    words = (
        "For whoever looks a flag up: every verb, out of the parsers themselves.\n\n"
        "    megatron-prune VERB …                                            one process\n"
        "    torchrun --nproc-per-node N -m megatron_prune VERB …              one process for each rank\n\n"
        "Flags may be written with dashes or underscores. `--config FILE` reads a YAML file of them, `--print-config` prints one. Exit "
        "codes: 0 done, 1 a check failed or something broke, 2 bad input with nothing written.\n\n"
    )
    return f"# The command line\n\n{words}| verb | |\n|---|---|\n" + "\n".join(rows) + "\n"


def verb_page(verb: str) -> str:
    """What a verb can be asked, in the groups of its help."""
    kind = options_of(verb)
    parser = parser_of(kind, f"megatron-prune {verb}")
    parts = [f"# {verb}", " ".join(kind.__doc__.split()), f"    {parser.usage}"]
    if "all" in kind.EXAMPLES:
        parts.append(f"For example:\n\n    {kind.EXAMPLES['all']}")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.option_strings and action.help != argparse.SUPPRESS]
        if actions:
            parts.append(f"## {group.title[0].upper()}{group.title[1:]}")
            parts += (
                [f"{group.description[0].upper()}{group.description[1:]}".replace(": ", ": `", 1) + "`"]
                if group.description
                else []
            )
            parts.append("| flag | |\n|---|---|\n" + "\n".join(map(row, actions)))
    return "\n\n".join(parts) + "\n"


def row(action: argparse.Action) -> str:
    """A flag and its text."""
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        shown = f"`{flag}`, `--no-{flag[2:]}`"
    else:
        value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}" + (" …" if action.nargs == "+" else "")
        shown = f"`{flag}{value}`"
    text = (action.help or "").replace("%%", "%").replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")
    return f"| {shown} | {text} |"
