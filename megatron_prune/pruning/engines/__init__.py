"""What runs the model that is pruned: megatron-core under TP, or transformers in one process."""
