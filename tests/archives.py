"""Whether the sdist and the wheel that were built of a source tree hold what they must.     python tests/archives.py SOURCE DIST"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

READ_AT_RUN_TIME = {
    "megatron_prune/py.typed",
    "megatron_prune/families/shipped/modeling_per_layer.py",
    "megatron_prune/families/shipped/configuration_nemotron_nas.py",
}
"""What is no module that anything imports."""

NOT_SHIPPED = {".gitignore"}


def files_of(folder: Path, root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in folder.rglob("*") if path.is_file()}


def check_wheel(wheel: Path, source: Path) -> int:
    """Number of its files: the package and nothing else, the licence, the metadata of setup.py."""
    package = {name for name in files_of(source / "megatron_prune", source) if not name.endswith(".pyc")}
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in held if ".dist-info/" in name}
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        licence = archive.read(f"{info}/licenses/LICENSE")
        commands = archive.read(f"{info}/entry_points.txt").decode()
    modules = {name for name in held if not name.startswith(info)}
    assert modules == package, f"lacks {sorted(package - modules)}, holds besides {sorted(modules - package)}"
    assert modules >= READ_AT_RUN_TIME, f"lacks {sorted(READ_AT_RUN_TIME - modules)}"
    assert licence == (source / "LICENSE").read_bytes() and b"Apache License" in licence
    assert metadata["License-Expression"] == "Apache-2.0", metadata.items()
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}, metadata["Requires-Python"]
    assert metadata.get_payload().strip() == (source / "README.md").read_text(encoding="utf-8").strip()
    assert "megatron-prune = megatron_prune.cli.main:main" in commands
    return len(held)


def check_sdist(sdist: Path, source: Path) -> int:
    """Number of its files: all that the repository holds."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    lacks = {name for name in files_of(source, source) if not name.endswith(".pyc")} - NOT_SHIPPED - held
    assert not lacks, f"lacks {sorted(lacks)}"
    return len(held)


if __name__ == "__main__":
    source, dist = map(Path, sys.argv[1:])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    print(f"{wheel.name}: {check_wheel(wheel, source)} files; {sdist.name}: {check_sdist(sdist, source)} files")
