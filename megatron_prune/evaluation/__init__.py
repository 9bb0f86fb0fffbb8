"""What a model is worth and how that is shown: perplexity, samples, before/after tables, model card."""
