"""What a verb opens: a model of either kind, what is said beside it, its tensors read by all processes."""
