"""README and docs: links lead somewhere, commands parse, flags exist, the first page stays short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prune.cli.parser import Parser, parse, parser_of
from megatron_prune.verbs.table import VERBS, options_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("containers/*.md")])
SCRIPTS = {
    "prune_hf/prune_llama.py": "prune-hf",
    "prune_llama.py": "prune",
    "hf_to_megatron.py": "convert",
    "megatron_to_hf.py": "export",
    "transfer.py": "transfer",
    "verify.py": "verify",
}
"""Files that are a verb under another name."""

OTHERS = {
    *("--nproc-per-node", "--max-restarts"),  # torchrun
    *("--nodes", "--gres", "--ntasks", "--cpus-per-task", "--exclusive"),  # Slurm
    *("--use-checkpoint-args", "--dist-ckpt-strictness"),  # Megatron-LM
    *("--build-arg", "--entrypoint", "--file", "--gpus", "--ipc", "--rm", "--tag", "--user", "--volume"),  # docker
    *("--bind", "--nv"),  # Apptainer
    *("--trust-remote-code", "--tensor-parallel-size", "--outfile"),  # vLLM, llama.cpp
}
"""Flags of programs that are not ours."""

MEASURES = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("emb_pruner/*/*.py"), ROOT / "megatron_prune/serving/to_gguf.py"]
"""Programs of ours that are no verbs."""

FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def parser_for(verb: str) -> Parser:
    return parser_of(options_of(verb), verb)


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every flag, with dashes."""
    ours = {flag for verb in VERBS for flag in parser_for(verb)._option_string_actions}
    measures = {flag for path in MEASURES for flag in FLAG.findall(path.read_text(encoding="utf-8"))}
    return {flag.replace("_", "-") for flag in ours | measures} | OTHERS | {"--order", "--version"}


def said_here(page: Path) -> str:
    """The text of a page without what it quotes of other tools: the first column of the tables of from-other-tools.md."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^\|[^|\n]*(?=\|)", "", text, flags=re.M) if page.name == "from-other-tools.md" else text


def blocks(text: str) -> Iterator[str]:
    """Code blocks, fenced or indented, with lines that are continued put together."""
    fenced = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
    indented = re.findall(r"(?:^    (?! *(?:[-*] |\|)).*\n)+", fenced.sub("", text), re.M)
    for block in (*fenced.findall(text), *indented):
        yield re.sub(r"\\\n\s*", " ", block)


def commands(text: str) -> Iterator[tuple[str, list[str], bool]]:
    """Verb and words of every command of ours, and whether it is a whole one: what stands in code between words need not be."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [(line, True) for block in blocks(text) for line in block.splitlines()]
    lines += [(span.replace("\n", " "), False) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    for line, whole in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe
            continue
        for number, word in enumerate(words):
            script = next((verb for name, verb in SCRIPTS.items() if f"/{word}".endswith(f"/{name}")), None)
            if word == "megatron-prune" or word == "megatron_prune" and words[number - 1] == "-m":
                rest = words[number + 1 :]
                verb = next((verb for verb in (" ".join(rest[:2]), *rest[:1]) if verb in VERBS), None)
                if verb:
                    yield verb, rest[len(verb.split()) :], whole
            elif script and number:
                yield script, words[number + 1 :], whole


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_is_one(page, monkeypatch):
    monkeypatch.setattr("megatron_prune.cli.parser.check_there", lambda options: None)
    for verb, words, whole in commands(said_here(page)):
        parser = parser_for(verb)
        if whole and not any("…" in word for word in words) and any(word.startswith("-") for word in words):
            parse(options_of(verb), words, prog=verb)
        for word in words:
            flag = parser.spelled(word).partition("=")[0]
            assert not flag.startswith("--") or flag in parser._option_string_actions, f"{verb}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_flag_exists(page, known):
    for flag in FLAG.findall(said_here(page)):
        assert flag.replace("_", "-").rstrip("-") in known, flag


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=page_id)
def test_a_page_begins_with_whom_it_serves(page):
    paragraphs = [part for part in page.read_text(encoding="utf-8").split("\n\n") if not part.startswith("#")]
    assert paragraphs[0].startswith("For who")


def test_commands_are_found():
    """So that the tests above see what they are to see."""
    found = [verb for page in PAGES for verb, _, _ in commands(said_here(page))]
    path = (ROOT / "README.md").read_text(encoding="utf-8").split("## The path")[1].split("\n## ")[0]
    path = [verb for verb, _, whole in commands(path) if whole]
    assert path == ["convert", "verify", "prune", "preprocess", "recover", "evaluate", "export"]
    assert {"vocab count", "vocab trim", "prune-hf"} <= set(found)


def test_the_metric_of_the_readme_scores(tiny, monkeypatch):
    """Its program, on a tiny model: fourth powers of all that a channel owns."""
    import torch
    from transformers import AutoModelForCausalLM

    import megatron_prune as mp
    from megatron_prune.importance.metric import METRICS

    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    asked = {}
    monkeypatch.setattr(mp, "prune", lambda *given, **options: asked.update(options, given=given), raising=False)
    exec(program, {})
    try:
        assert asked["given"] == ("demo/model", {"ffn_hidden_size": 1152}) and asked["save"] == "smaller"
        plan = mp.plan(tiny("qwen2"), {"ffn_hidden_size": 40}, metric=asked["metric"], refit=asked["refit"])
        mlp = AutoModelForCausalLM.from_pretrained(tiny("qwen2")).model.layers[0].mlp
        owned = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], dim=1)
        best = owned.double().pow(4).sum(dim=1).topk(40).indices.sort().values.tolist()
        assert list(plan.layers[0].ffn) == best
    finally:
        METRICS.forget("fourth_powers")
