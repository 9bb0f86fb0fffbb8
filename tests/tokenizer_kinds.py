"""Small tokenizers of every kind, trained and written to disk by the libraries that run them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

PROSE = Path(__file__).parent / "fixtures" / "prose.md"

PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
OTHER = "Zwölf Boxkämpfer jagen Viktor. Съешь ещё этих мягких французских булок. 床前明月光，疑是地上霜。 👩‍👩‍👧 naïve café\n"


def text() -> str:
    """What all are trained on: an early README, kept as it was, since every tokenizer is another one where a word of it changes."""
    return PROSE.read_text(encoding="utf-8") + OTHER * 8


def write_json(folder: Path, tokenizer, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def byte_level(folder: Path, *, size: int = 700, ignore_merges: bool = False, specials_last: bool = False) -> Path:
    """GPT-2's kind; ``specials_last`` as Llama 3 has them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - (len(SPECIALS) if specials_last else 0),
        special_tokens=[] if specials_last else SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text()], trainer)
    if specials_last:
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    bos = tokenizer.token_to_id(SPECIALS[1])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[1]} $A", pair=f"{SPECIALS[1]} $A $B", special_tokens=[(SPECIALS[1], bos)]
    )
    special = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2], "chat_template": TEMPLATE}
    return write_json(folder, tokenizer, special)


def rank_file(folder: Path) -> Path:
    """Qwen 1's kind: ranks of bytes, and a Python file that says the rest."""
    from tokenizers import Tokenizer

    from megatron_prune.vocabulary.kinds.tokenizer_json import byte_alphabet

    made = byte_level(folder / "made", specials_last=True)
    model = json.loads(Tokenizer.from_file(str(made / "tokenizer.json")).to_str())["model"]
    back = {character: byte for byte, character in byte_alphabet().items()}
    ranks = {bytes(back[character] for character in piece): number for piece, number in model["vocab"].items()}
    lines = [b"%s %d\n" % (base64.b64encode(piece), rank) for piece, rank in sorted(ranks.items(), key=lambda pair: pair[1])]
    (folder / "toy.tiktoken").write_bytes(b"".join(lines))
    code = f'# ids\nPAT_STR = r"""{PATTERN}"""\nSPECIAL_START_ID = {len(ranks)}  # first after the ranks\nSPECIALS = 3\n'
    (folder / "tokenization_toy.py").write_text(code, encoding="utf-8")
    for file in made.iterdir():
        file.unlink()
    made.rmdir()
    return folder


def json_and_ranks(folder: Path) -> Path:
    """Llama 3's kind: ``tokenizer.json`` that lists every rule tiktoken's ranks stand for, and the ranks."""
    rank_file(folder)
    from megatron_prune.vocabulary.kinds.tokenizer_json import byte_alphabet

    made = json.loads((byte_level(folder / "made", ignore_merges=True, specials_last=True) / "tokenizer.json").read_text())
    (folder / "made" / "tokenizer.json").unlink()
    (folder / "made" / "tokenizer_config.json").rename(folder / "tokenizer_config.json")
    (folder / "made").rmdir()
    vocab = made["model"]["vocab"]
    assert set("".join(vocab)) <= set(byte_alphabet().values())
    rules = []
    for piece, number in sorted(vocab.items(), key=lambda pair: pair[1]):
        rules += [[piece[:cut], piece[cut:]] for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab]
    made["model"]["merges"] = rules
    (folder / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    return folder


def sentencepiece(folder: Path, *, kind: str = "bpe", fallback: bool = True, size: int = 700) -> Path:
    """``tokenizer.model`` alone."""
    import sentencepiece as spm

    folder.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text().splitlines()),
        model_writer=held,
        model_type=kind,
        vocab_size=size,
        byte_fallback=fallback,
        character_coverage=0.98 if fallback else 1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(held.getvalue())
    return folder


def llama2(folder: Path, *, size: int = 700) -> Path:
    """SentencePiece's BPE and the ``tokenizer.json`` that is converted from it: several rules for one piece."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    sentencepiece(folder, size=size)
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    ids = {entry.piece: number for number, entry in enumerate(proto.pieces)}
    rules = []
    for piece, number in ids.items():
        if proto.pieces[number].type == 1:
            cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in ids and piece[cut:] in ids]
            rules += [(-proto.pieces[number].score, ids[left], ids[right], (left, right)) for left, right in cuts]
    merges = [pair for *_, pair in sorted(rules)]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in ("<unk>", "<s>", "</s>")])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return write_json(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def unigram_json(folder: Path, *, size: int = 600) -> Path:
    """Unigram of Hugging Face, without bytes to fall back to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(text().splitlines(), trainer)
    return write_json(folder, tokenizer, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})


def gpt2_files(folder: Path) -> Path:
    """``vocab.json`` and ``merges.txt``, as old directories hold them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIALS[:1], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text()], trainer)
    tokenizer.model.save(str(folder))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), SPECIALS[0])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 0}))
    return folder


KINDS = {
    "byte_level": byte_level,
    "byte_level_words": lambda folder: byte_level(folder, ignore_merges=True, specials_last=True),
    "rank_file": rank_file,
    "json_and_ranks": json_and_ranks,
    "llama2": llama2,
    "sentencepiece_bpe": sentencepiece,
    "sentencepiece_unigram": lambda folder: sentencepiece(folder, kind="unigram"),
    "sentencepiece_unigram_unk": lambda folder: sentencepiece(folder, kind="unigram", fallback=False),
    "unigram_json": unigram_json,
    "gpt2_files": gpt2_files,
}
