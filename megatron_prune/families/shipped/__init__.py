"""Files that leave with a model: code for transformers and others who load it. They import nothing of this package."""
