"""One file per verb: its options, and the function that the command line calls."""
