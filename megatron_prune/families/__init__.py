"""Model families: one file each, one table read in both directions. Found by :data:`family.FAMILIES`."""
