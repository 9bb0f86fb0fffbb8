"""Prune a transformers model in memory: a quarter of its parameters goes, what stays is re-fitted on a few texts.

python examples/prune_in_memory.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_prune as mp

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)

texts = [f"{word} is a word, and so is its end: {word[-3:]}. What follows is another one." for word in sorted(vars(mp))] * 8
small = mp.prune(model, {"ratio": 0.25}, texts=texts, tokenizer=tokenizer, nsamples=4, seq_length=32, reconstruct=0)

print(f"{model.num_parameters():,} parameters → {small.num_parameters():,}")
print(tokenizer.decode(small.generate(**tokenizer("A word", return_tensors="pt"), max_new_tokens=8)[0]))
