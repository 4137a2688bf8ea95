"""Hugging Face directories: config, tensors, tokenizer, end tokens, transformers' model.

Nothing is imported here: a plan needs configs, but not `hf_model`, which imports torch.
"""
