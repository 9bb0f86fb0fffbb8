"""Cut a model to the ids that stay, under the arguments of jordddan/Pruning-LLMs.

Unlike there the model's directory is left as it is: the result is a directory of its own. Ids that the special tokens, the bytes
and the kept tokens need are added where the list lacks them.
"""

from megatron_prune.cli.main import guarded, run_verb
from megatron_prune.cli.parser import Parser
from megatron_prune.config import nonempty

PROG = "prune_spm_and_emb.py"


def main() -> None:
    parser = Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--remain_vocab_path", type=nonempty, required=True, help="file of ids (remain_vocab_ids.pt)")
    add("--hf_dir", type=nonempty, required=True, help="Hugging Face directory (or a Megatron checkpoint)")
    add("--remain_ids_with_spt", type=nonempty, required=True, help="file to write: old ids that stay, in their new order")
    add("--save_dir", type=nonempty, help="directory to write (default: HF_DIR_pruned)")
    add("--overwrite", action="store_true", help="replace an existing output directory")
    options = parser.parse_args()
    save = options.save_dir or options.hf_dir.rstrip("/") + "_pruned"
    files = ["--load", options.hf_dir, "--save", save, "--save-ids", options.remain_ids_with_spt]
    again = ["--overwrite"] if options.overwrite else []
    run_verb("vocab trim", [*files, "--keep-ids", options.remain_vocab_path, *again], prog=PROG)


if __name__ == "__main__":
    guarded(main, PROG)
