"""megatron-prune: turn a pretrained language model into a smaller one, on tensor-parallel shards."""

__version__ = "0.1.0"
