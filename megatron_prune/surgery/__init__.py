"""Plan and tensors in, smaller tensors out; one role tensor at a time."""
