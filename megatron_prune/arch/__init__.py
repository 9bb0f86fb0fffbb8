"""What a model is: sizes, tensors, fused rows and shard arithmetic. Pure: no files, no processes."""
