"""A gated feed-forward block (Shazeer 2020, arXiv 2002.05202): ``down(activation(gate(x)) · up(x))``; a unit is a channel.

Megatron fuses gate and up in halves: all rows of gate, then all of up; a rank holds rows of gate, then the same of up.
"""

from megatron_prune.arch.blocks.block import BLOCKS, BlockKind, MegatronTensor, Role, replicated

_FC1, _FC2 = "mlp.linear_fc1.", "mlp.linear_fc2."

BLOCKS.register("gated")(
    BlockKind(
        name="gated",
        half="mlp",
        roles=(
            Role("post_norm", ("hidden",)),
            Role("gate", ("ffn", "hidden")),
            Role("up", ("ffn", "hidden")),
            Role("down", ("hidden", "ffn")),
            Role("down_norm", ("hidden",), "after_norms"),
        ),
        norm="post_norm",
        readers=("gate", "up"),
        inside="channels",
        inside_space="ffn",
        writer="down",
        after_norm="down_norm",
        axes=("ffn",),
        mixes_tokens=False,
        megatron=(
            replicated(_FC1 + "layer_norm_weight", "pre_mlp_layernorm.weight", "post_norm"),
            MegatronTensor(name=_FC1 + "weight", local_name=_FC1 + "weight", roles=("gate", "up"), split="gated", axis="ffn"),
            MegatronTensor(name=_FC2 + "weight", local_name=_FC2 + "weight", roles=("down",), split="cols", axis="ffn"),
            replicated(_FC2 + "post_layernorm.weight", _FC2 + "post_layernorm.weight", "down_norm"),
        ),
    )
)
