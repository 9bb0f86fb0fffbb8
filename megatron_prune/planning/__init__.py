"""Which units stay: the target, the selection, and the plan that records it."""
