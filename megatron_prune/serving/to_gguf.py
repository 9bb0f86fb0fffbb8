"""Run llama.cpp's own ``convert_hf_to_gguf.py`` with the pre-tokenizer named, which it finds by ids that a trim changes.

    python megatron_prune/serving/to_gguf.py LLAMA.CPP/convert_hf_to_gguf.py MODEL --outfile model.gguf [--pre smollm] [its arguments]

``--pre`` is a name of llama.cpp's (``tokenizer.ggml.pre``); without it the name is found in ``tokenizer.json``. A ``nemotron-nas``
model's tokenizer is then read as byte-level BPE whatever its size. It is a program by itself, which the Python that the
converter runs with runs: that may have neither torch nor this package.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def found_name(model: Path) -> str:
    """The name that ``tokenizer.json`` of a model stands for; ends the process with code 2 where none does."""
    sys.path.insert(0, str(ROOT))
    try:
        from megatron_prune.serving.pre_tokenizer import pre_tokenizer_of
    except ImportError as error:
        sys.exit(_fail(f"--pre is needed: megatron_prune cannot be imported here ({error})"))
    finally:
        sys.path.remove(str(ROOT))
    name = pre_tokenizer_of(model)
    if name is None:
        sys.exit(_fail(f"{model} needs no name: it has no byte-level BPE; run the converter itself"))
    return name or sys.exit(_fail(f"--pre is needed: the pre-tokenizer of {model} is none that is known here"))


def _fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 2


def main(argv: list[str]) -> None:
    """Load the converter as a module, give its classes the name, and run it with the other arguments."""
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]  # whose modules are not the converter's
    parser = argparse.ArgumentParser(prog="to_gguf.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("--pre", help="llama.cpp's name of the pre-tokenizer (default: found in tokenizer.json)")
    options, others = parser.parse_known_args(argv)
    if not options.converter.is_file():
        sys.exit(_fail(f"no such file: {options.converter}"))
    name = options.pre or found_name(options.model)
    sys.path.insert(0, str(options.converter.resolve().parent))
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", options.converter)
    module = sys.modules["convert_hf_to_gguf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if importlib.util.find_spec("conversion"):  # releases that keep their classes beside the script load them late
        importlib.import_module("conversion.deci")
    # The method is of a class in the script itself, or in the package beside it, by release.
    kinds = {value for known in list(sys.modules.values()) for value in vars(known or object).values() if isinstance(value, type)}
    for kind in [kind for kind in kinds if "get_vocab_base_pre" in vars(kind)]:
        kind.get_vocab_base_pre = lambda self, tokenizer: name
    for kind in [kind for kind in kinds if kind.__name__ == "DeciModel"]:  # else it takes every size but one for SentencePiece
        kind.set_vocab = lambda self: self._set_vocab_gpt2()
    sys.argv = [str(options.converter), str(options.model), *others]
    print(f"pre-tokenizer: {name}", file=sys.stderr)
    module.main()


if __name__ == "__main__":
    main(sys.argv[1:])
