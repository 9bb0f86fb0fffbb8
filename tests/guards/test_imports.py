"""Rooms stand in one order, and each imports only from those before it; no module is in a circle. Late imports count too."""

from __future__ import annotations

import graphlib
import json
import subprocess
import sys

from trees import PACKAGE, ROOT, imports, modules, room

ORDER = (
    *(PACKAGE, "errors", "registry", "config"),
    *("files", "arch", "axes", "families", "serving", "checkpoint", "planning"),
    *("runtime", "opening", "text", "vocabulary", "evaluation", "importance", "surgery"),
    *("writing", "pruning", "recovery", "verbs", "steps", "spelling", "in_memory", "api", "cli", "__main__"),
)


def test_every_room_has_its_place():
    assert {room(module) for module in modules()} == set(ORDER)


def test_a_room_imports_only_from_rooms_before_it():
    upwards = [
        f"{module}:{line} imports {name}"
        for module in modules()
        for name, line in imports(module)
        if ORDER.index(room(name)) > ORDER.index(room(module))
    ]
    assert not upwards, "move what both need into a room below both:\n" + "\n".join(upwards)


def test_no_module_is_in_a_circle():
    graph = {module: {name for name, _ in imports(module)} - {module} for module in modules()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as circle:
        raise AssertionError(" → ".join(circle.args[1])) from None


def test_the_design_names_every_room():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    missing = [name for name in ORDER[1:-1] if f"{name}/" not in text and f"{name}.py" not in text]
    assert not missing


def test_no_verb_waits_for_torch_to_say_what_it_can_be_asked():
    """Help, completion and messages about a command line: without what takes a second to import."""
    code = (
        "import sys\nfrom megatron_prune.cli import main, completion\nfrom megatron_prune.cli.parser import parser_of\n"
        "from megatron_prune.verbs.table import VERBS, options_of\n"
        "for verb in VERBS: parser_of(options_of(verb), verb).format_help()\n"
        "print(*sorted({'torch', 'transformers', 'megatron', 'datasets', 'rich', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.split() == []


def test_an_estimate_of_a_configuration_waits_for_no_torch(tmp_path):
    """Budgets and what would fit included: the rooms that this takes stay free of it."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    said = {"model_type": "llama", "num_hidden_layers": 4, "vocab_size": 512, "max_position_embeddings": 64, **sizes}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, **said}))
    asked = [str(tmp_path / "config.json"), "--ratio", "0.2", "--device-memory", "1GiB"]
    code = (
        f"import sys\nfrom megatron_prune.cli.main import main\nmain(['estimate', *{asked!r}])\n"
        "print(*sorted({'torch', 'transformers', 'megatron', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "shapes within the budget" in found.stdout and found.stdout.splitlines()[-1] == ""
