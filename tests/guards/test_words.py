"""What a layer consists of is said in one place: no role and no size of a layer is named elsewhere."""

from __future__ import annotations

import ast

from trees import ROOT, modules

from megatron_prune.arch.blocks.block import BLOCKS, OUTER
from megatron_prune.arch.model import PER_LAYER

ROLES = {role.name for role in OUTER} | {role.name for name in BLOCKS.names() for role in BLOCKS.get(name).roles}
NAME_ROLES = ("megatron_prune.arch.blocks.", "megatron_prune.families.", "megatron_prune.importance.metrics.")
MEGATRON_ARGUMENTS = (
    *("megatron_prune.checkpoint.megatron_args", "megatron_prune.checkpoint.description", "megatron_prune.checkpoint.known_args"),
    *(
        "megatron_prune.checkpoint.heterogeneous",
        "megatron_prune.checkpoint.gemma3_args",
        "megatron_prune.checkpoint.megatron_lm_flags",
    ),
    *("megatron_prune.runtime.core_config", "megatron_prune.runtime.megatron_flags", "megatron_prune.runtime.layers"),
)
KNOW_SIZES = ("megatron_prune.arch.", "megatron_prune.families.", *MEGATRON_ARGUMENTS)


def trees():
    for module in modules():
        path = ROOT / f"{module.replace('.', '/')}.py"
        if path.exists():
            yield module, ast.parse(path.read_text(encoding="utf-8"))


def test_no_role_stands_in_quotes_but_where_blocks_families_and_metrics_say_what_they_are():
    named = [
        f"{module}:{node.lineno} {node.value!r}"
        for module, tree in trees()
        if not module.startswith(NAME_ROLES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ROLES and module + ":" + node.value not in OTHER_WORDS
    ]
    assert not named, (
        "ask the block kind (arch/blocks/block.py), or arch/tensors.py for what is outside the layers:\n" + "\n".join(named)
    )


OTHER_WORDS = {
    "megatron_prune.checkpoint.torch_dist:v",  # the ending of a name
    "megatron_prune.config:o",  # of flags of other tools
    "megatron_prune.config:output",
    "megatron_prune.verbs.vocab_count:output",  # of a flag
}
"""Where the same word means something else."""


def test_no_size_that_layers_may_differ_in_is_read_as_if_it_were_one_number():
    read = [
        f"{module}:{node.lineno} .{node.attr}"
        for module, tree in trees()
        if not module.startswith(KNOW_SIZES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in PER_LAYER and _is_a_config(node.value)
    ]
    assert not read, "ask for units(axis) or size(space) of the layer's configuration:\n" + "\n".join(read)


def _is_a_config(value: ast.expr) -> bool:
    """Whether what an attribute is read of is called a configuration: options of a verb have the same words."""
    name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
    return name.strip("_") in ("config", "model", "old", "new", "target", "shape", "student", "teacher", "described", "layer")
