"""Install megatron-prune into NVIDIA's PyTorch image and leave what NVIDIA built there alone.

Dockerfile and megatron-prune.def run it while they build; with ``--check`` it installs nothing and says whether all is there.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
# Built against each other, and on no index: pip must neither replace nor upgrade them.
BUILT = ("torch", "torchvision", "triton", "numpy", "transformer-engine", "apex", "flash-attn")


def refuse(what: str) -> None:
    """End the build."""
    raise SystemExit(f"{what}\n  Choose another image: TAG, see containers/README.md")


def check_torch(found: str) -> None:
    """Refuse an image whose torch setup.py does not admit, before anything is installed into it."""
    admitted = re.search(r'"torch([^"]*)"', (ROOT / "setup.py").read_text(encoding="utf-8")).group(1)
    # NVIDIA's builds are called alphas: 2.13.0a0+… is admitted by <2.14, 2.14.0a0+… is not.
    if not SpecifierSet(admitted).contains(found, prereleases=True):
        refuse(f"This image carries torch {found}; megatron-prune needs torch{admitted}.")


def built() -> list[str]:
    """What is to stay, as pip constraints."""
    lines = []
    for name in BUILT:
        with suppress(PackageNotFoundError):
            lines.append(f"{name}=={version(name)}")
    return lines


def install() -> int:
    """Let pip add the package and what it lacks."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(built()), encoding="utf-8")
        # In place of the image's own constraint file, whose pins are older than what transformers 5 needs.
        environment = {**os.environ, "PIP_CONSTRAINT": str(constraints), "PIP_BREAK_SYSTEM_PACKAGES": "1"}
        pip = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check"]
        # Editable: the scripts and the command run one copy of the code.
        return subprocess.run([*pip, "--editable", f"{ROOT}[demo]"], env=environment, check=False).returncode


def check() -> None:
    """Refuse an image whose Transformer Engine or Apex cannot be used."""
    megatron = "megatron.core.extensions.transformer_engine"
    # apex.normalization: the unrelated package called apex on PyPI has none.
    for name in ("transformer_engine.pytorch", "apex.normalization", megatron, "megatron_prune.cli.main"):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  whatever it is, it cannot be used
            refuse(f"{name} cannot be imported: {error!r}")
    # Where Transformer Engine has moved what megatron-core imports, that goes on without it and says nothing.
    if not sys.modules[megatron].HAVE_TE:
        refuse(f"megatron-core {version('megatron-core')} cannot use Transformer Engine {version('transformer-engine')}.")


if __name__ == "__main__":
    check_torch(version("torch"))
    sys.exit(check() if sys.argv[1:] == ["--check"] else install())
