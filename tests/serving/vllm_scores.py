"""Run by a Python that has vLLM: ``vllm_scores.py TOKENS TP FOLDER…``; prints for each folder a line of JSON: what the text's tokens
score (natural logarithms of their probabilities, from the second on), or an error."""

import gc
import json
import os
import sys

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")


def scores(folder, tokens, ranks):
    from vllm import LLM, SamplingParams

    model = LLM(
        folder,
        dtype="float32",
        trust_remote_code=True,  # our own file beside a model whose layers differ
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        gpu_memory_utilization=0.1,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        tensor_parallel_size=ranks,
    )
    asked = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    (answer,) = model.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
    return [answer.prompt_logprobs[place][token].logprob for place, token in enumerate(tokens) if place]


if __name__ == "__main__":
    given, parallel = json.loads(sys.argv[1]), int(sys.argv[2])
    if parallel == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(parallel))
    for path in sys.argv[3:]:
        try:
            found = {"scores": scores(path, given, parallel)}
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        print("RESULT " + json.dumps({"folder": path, **found}), flush=True)
