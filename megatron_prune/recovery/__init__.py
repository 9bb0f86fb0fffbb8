"""Training after pruning: plain, distilled from the unpruned teacher, or of adapters alone."""
