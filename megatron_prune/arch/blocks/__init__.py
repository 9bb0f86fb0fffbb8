"""The kinds of block that a layer can consist of: one file each, found by :data:`block.BLOCKS`."""
