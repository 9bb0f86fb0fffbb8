"""README and docs: links lead somewhere, commands parse, flags exist, the first page stays short."""

from __future__ import annotations

import ast
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
    *("--trust-remote-code", "--tensor-parallel-size", "--outfile", "--model-path", "--tp"),  # vLLM, llama.cpp, SGLang
}
"""Flags of programs that are not ours."""

MEASURES = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("emb_pruner/*/*.py"), ROOT / "megatron_prune/serving/to_gguf.py"]
"""Programs of ours that are no verbs."""

FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def parser_for(verb: str) -> Parser:
    return parser_of(options_of(verb), verb)


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


def shown_flags(verb: str) -> set[str]:
    """Flags as the help of a verb spells them: of each the first of its names."""
    actions = [action for action in parser_for(verb)._actions if action.option_strings]
    switched = {name for action in actions for name in action.option_strings if name.startswith("--no-")}
    return {action.option_strings[0] for action in actions} | switched | {"--help"}


@pytest.fixture(scope="module")
def canonical() -> set[str]:
    """Every flag, in the one spelling in which it is shown."""
    measures = {flag for path in MEASURES for flag in FLAG.findall(path.read_text(encoding="utf-8"))}
    return {flag for verb in VERBS for flag in shown_flags(verb)} | measures | OTHERS | {"--order", "--version"}


QUOTING = {"from-other-tools.md", "CHANGELOG.md"}
"""Pages that quote commands as users of other tools have them, and name what flags were called before."""

TOLD = [
    *(page for page in PAGES if page.name not in QUOTING),
    *ROOT.glob("scripts/*.sh"),
    *ROOT.glob("tools/**/*.sh"),
    *ROOT.glob("examples/*"),
    *ROOT.glob("*.py"),
]
SHELL = {
    *("--export", "--job-name", "--kill-on-bad-exit", "--ntasks-per-node"),  # Slurm
    *("--line-buffered",),  # sed
    *("--local-addr", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-conf", "--rdzv-endpoint", "--rdzv-id", "--standalone"),
}
"""Flags in scripts, of programs that these start (the last: torchrun)."""


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in QUOTING], ids=page_id)
def test_every_flag_that_is_quoted_exists(page, canonical):
    taken = canonical | {flag for verb in VERBS for flag in parser_for(verb)._option_string_actions}
    taken |= {flag.replace("_", "-") for flag in taken}
    for flag in FLAG.findall(said_here(page)):
        assert flag.replace("_", "-").rstrip("-") in taken, flag


@pytest.mark.parametrize("page", TOLD, ids=page_id)
def test_every_flag_is_spelled_as_the_help_spells_it(page, canonical):
    if page.suffix == ".ipynb" or page.is_dir():
        pytest.skip("no text")
    odd = {flag for flag in FLAG.findall(page.read_text(encoding="utf-8")) if flag.rstrip("-") not in canonical | SHELL}
    assert not odd


IN_MESSAGES = {
    *("--no", "--flag", "--seq_length"),  # of a switch; of any flag, and that underscores are taken (cli/parser.py)
    *("--private", "--no-private"),  # hf
    *("--rotary-seq-len-interpolation-factor", "--window-size"),  # Megatron-LM
}


def test_every_flag_in_a_message_is_spelled_as_the_help_spells_it(canonical):
    """In all strings of the package; and no message makes a flag of a name but by ``config.flag``."""
    odd = []
    for path in sorted((ROOT / "megatron_prune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                flags = [flag for flag in FLAG.findall(node.value) if flag.rstrip("-") not in canonical | IN_MESSAGES]
                odd += [f"{path.relative_to(ROOT)}:{node.lineno} {flag}" for flag in flags]
            elif isinstance(node, ast.JoinedStr):
                parts = zip(node.values, node.values[1:])
                made = [
                    text.value for text, after in parts if isinstance(text, ast.Constant) and _makes_a_flag(text.value, after)
                ]
                odd += [f"{path.relative_to(ROOT)}:{node.lineno} {text}…" for text in made if path.name not in ("config.py",)]
    assert not odd, "\n".join(odd)


def _makes_a_flag(text: str, after: ast.expr) -> bool:
    """Whether a name is put behind dashes."""
    whole = isinstance(after, ast.FormattedValue) and isinstance(after.value, (ast.Name, ast.Attribute))
    return whole and re.search(r"(?<![\w-])--$", text) is not None


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
