"""Count a corpus and choose the tokens that stay, under the arguments of jordddan/Pruning-LLMs.

``--spm`` names ``tokenizer.model`` or a model's directory: all tokenizer files beside it count, whatever their kind. Written:
``VOCAB_FREQ.txt`` (lines "id count", the most frequent first) and the ids that stay, as a list that ``torch.load`` reads. Unlike
there, the size is exact: special tokens and the 256 bytes are among the ids, and so is what kept tokens are put together from.
"""

import io
import tempfile
from pathlib import Path

import torch

from megatron_prune.cli.main import guarded, run_verb
from megatron_prune.cli.parser import Parser
from megatron_prune.config import nonempty
from megatron_prune.files import staging

PROG = "get_vocab_freq.py"


def main() -> None:
    parser = Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--data_type", choices=["txt", "jsonl", "mmap"], default="mmap", help="mmap: prefix of a Megatron .bin/.idx pair")
    add("--data_path", type=nonempty, nargs="+", required=True, help="corpora of that type")
    add("--vocab_freq", type=nonempty, required=True, help="start of the name of the counts: .txt and .safetensors are added")
    add("--model_name", choices=["llama"], default="llama", help="accepted; the tokenizer says itself what it is")
    add("--spm", type=nonempty, required=True, help="tokenizer.model, or the directory of a model")
    add("--remain_vocab_size", type=int, default=20000, help="tokens that stay, in all")
    add("--remain_vocab_ids_path", type=nonempty, required=True, help="file of ids to write (remain_vocab_ids.pt)")
    add("--new_spm_path", type=nonempty, help="also write the trimmed tokenizer into this directory")
    add("--data_field", type=nonempty, default="text", help="name of the text in jsonl")
    add("--overwrite", action="store_true", help="replace existing counts and tokenizer")
    options = parser.parse_args()
    staging.check_file(Path(options.remain_vocab_ids_path))
    named = Path(options.spm)
    folder = str(named.parent if named.is_file() else named)
    for path in options.data_path:
        kind = "jsonl" if path.endswith((".jsonl", ".json", ".jsonl.gz")) else "mmap" if not Path(path).is_file() else "txt"
        kind = "mmap" if path.endswith((".bin", ".idx")) else kind
        if kind != options.data_type and not Path(path).is_dir():
            parser.error(f"--data_path {path} is not of --data_type {options.data_type}")
    again = ["--overwrite"] if options.overwrite else []
    counts = f"{options.vocab_freq}.safetensors"
    files = ["--save", counts, "--text", f"{options.vocab_freq}.txt", "--data-field", options.data_field]
    run_verb("vocab count", ["--tokenizer", folder, "--input", *options.data_path, *files, *again], prog=PROG)
    with tempfile.TemporaryDirectory() as work:
        chosen = ["--load", folder, "--counts", counts, "--remain-vocab-size", str(options.remain_vocab_size)]
        run_verb("vocab select", [*chosen, "--save-ids", f"{work}/ids.pt"], prog=PROG)
        ids = torch.load(f"{work}/ids.pt", weights_only=True).tolist()
    held = io.BytesIO()
    torch.save(ids, held)
    staging.write_files({Path(options.remain_vocab_ids_path): held.getvalue()})
    if options.new_spm_path:
        trim = ["--load", folder, "--keep-ids", options.remain_vocab_ids_path, "--save", options.new_spm_path]
        run_verb("vocab trim", [*trim, "--tokenizer-only", *again], prog=PROG)


if __name__ == "__main__":
    guarded(main, PROG)
