"""The engine's tokenizer is the same for every backend; it lives in `backends.tokenizer`."""

from trtllm_redrafter.backends.tokenizer import TOKENIZER_DIRECTORY, EngineTokenizer, eos_token_ids

__all__ = ["TOKENIZER_DIRECTORY", "EngineTokenizer", "eos_token_ids"]
