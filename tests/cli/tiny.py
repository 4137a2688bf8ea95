"""A tiny base model with a byte-level tokenizer and a chat template, and a drafter for it: enough for whole runs."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models import write_base, write_drafter

SPECIALS = ("<unk>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def write_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> int:
    """Bytes as tokens behind three special ones; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(path)
    return len(vocab)


def write_models(path: Path, **changes: object) -> tuple[Path, Path]:
    """A llama base with tokenizer, and a drafter, below `path`."""
    base = write_base(path / "base", "llama", vocab_size=259, tie_word_embeddings=True, **changes)
    write_tokenizer(base)
    return base, write_drafter(path / "drafter", vocab_size=259, draft_len=3)
