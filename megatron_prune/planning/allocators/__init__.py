"""How a budget is dealt out to layers: one file each, found by :data:`allocator.ALLOCATORS`."""
