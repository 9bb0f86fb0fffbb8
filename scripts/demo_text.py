"""English text that every Python has: ``pydoc_data.topics``, in two parts that share no topic.

Every fourth topic is held out for measuring; the others are for calibration.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics


def main(calibration: Path, held_out: Path) -> None:
    """Write the two files."""
    names = sorted(topics)
    held_out.write_text("\n\n".join(topics[name] for name in names[3::4]), encoding="utf-8")
    rest = [name for number, name in enumerate(names) if number % 4 != 3]
    calibration.write_text("\n\n".join(topics[name] for name in rest), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
