"""Run by a Python that has xllamacpp: ``llama_cpp_scores.py GGUF PROMPTS FORCED``; prints for each of the prompts (texts, or lists of
tokens) a line of JSON: its tokens' number, and what the likeliest next ones score (natural logarithms of probabilities, by id).

FORCED is a token that is a character by itself, taken next: llama.cpp says nothing of one that is part of a character.
"""

import json
import sys

import xllamacpp


def server(path):
    asked = xllamacpp.CommonParams()
    asked.model.path = path
    asked.n_ctx, asked.n_parallel, asked.warmup, asked.cpuparams.n_threads = 512, 1, False, 1
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(asked)


def following(running, prompt, forced):
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20, "ignore_eos": True, "cache_prompt": False}
    answer = running.handle_completions({**asked, "logit_bias": [[forced, 1000.0]]})
    likely = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {"tokens": answer["usage"]["prompt_tokens"], "scores": {entry["id"]: entry["logprob"] for entry in likely}}


if __name__ == "__main__":
    running = server(sys.argv[1])
    for prompt in json.loads(sys.argv[2]):
        print("RESULT " + json.dumps(following(running, prompt, int(sys.argv[3]))), flush=True)
