"""What a verb writes: whether it may, where it is staged, how tensors get there, the check before it is put in place."""
