"""One file per arrow of the data's path; each has an options dataclass and a function that the command line calls."""
