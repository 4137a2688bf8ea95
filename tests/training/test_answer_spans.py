"""Which tokens of a chat are learnt, for templates that write answers in one way, in several, or mark them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import write_tokenizer
from tests.prompts.test_chat_template import QWEN
from trtllm_redrafter.errors import InputError, RequestError
from trtllm_redrafter.prompts.chat_template import ChatTemplate
from trtllm_redrafter.training.answer_spans import answered_texts

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REASONING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
MARKED_WITH_END = MARKED.replace("{% endgeneration %}", "<|im_end|>\n{% endgeneration %}")
REWRITING = "{{ messages | length }}" + PLAIN


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("t") / "t"))
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]})
    return made


def learnt(tokenizer: Any, source: str, *turns: str, **kwargs: Any) -> list[list[str]]:
    """Answers of each text, from a conversation of user and assistant in turn."""
    tokenizer.chat_template = source
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    chat = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    texts = answered_texts(tokenizer, template, chat, kwargs, frozenset({end}))
    return [[tokenizer.decode(ids[a:b]) for a, b in spans] for ids, spans in texts]


def test_an_answer_is_what_the_template_adds(tokenizer: Any) -> None:
    assert learnt(tokenizer, PLAIN, "hi", "hello", "and?", "more") == [["hello<|im_end|>", "more<|im_end|>"]]


def test_answers_that_are_rewritten_later_are_texts_of_their_own(tokenizer: Any) -> None:
    think = "<think>\n\n</think>\n\n"
    assert learnt(tokenizer, QWEN, "hi", "hello", "and?", "more") == [
        [f"{think}hello<|im_end|>"],
        [f"{think}more<|im_end|>"],
    ]
    assert learnt(tokenizer, QWEN, "hi", "hello", "and?", "more", enable_thinking=False) == [
        ["hello<|im_end|>"],
        ["more<|im_end|>"],
    ]


def test_the_texts_are_what_the_model_has_before_it(tokenizer: Any) -> None:
    tokenizer.chat_template = QWEN
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    chat = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    texts = answered_texts(tokenizer, template, chat, {}, frozenset({end}))
    for (ids, spans), count in zip(texts, (1, 3), strict=True):
        asked = template.render(chat[:count], {}, answer_next=True).text
        assert tokenizer.decode(ids[: spans[-1][0]]) == asked


def test_a_generation_prompt_that_later_turns_lack(tokenizer: Any) -> None:
    assert learnt(tokenizer, REASONING, "hi", "hello", "and?", "more") == [["hello<|im_end|>", "more<|im_end|>"]]


@pytest.mark.parametrize("source", [MARKED, MARKED_WITH_END])
def test_the_templates_own_marks(tokenizer: Any, source: str) -> None:
    assert learnt(tokenizer, source, "hi", "hé", "and?", "")[0][0] == "hé<|im_end|>"
    reference = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hé!"}],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask, ids = reference["assistant_masks"], reference["input_ids"]
    ours = learnt(tokenizer, source, "hi", "hé!")[0][0]
    theirs = tokenizer.decode([i for i, inside in zip(ids, mask, strict=True) if inside])
    assert ours.removesuffix("<|im_end|>") == theirs.removesuffix("\n").removesuffix("<|im_end|>")


def test_what_cannot_be_found(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="rewrites earlier turns at message 2"):
        learnt(tokenizer, REWRITING, "hi", "hello")
    with pytest.raises(InputError, match="marks no answer"):
        learnt(tokenizer, "{% if false %}{% generation %}{% endgeneration %}{% endif %}x", "hi", "hello")
    with pytest.raises(InputError, match="nothing to learn"):
        learnt(tokenizer, PLAIN, "hi")
    with pytest.raises(RequestError, match="refused the messages"):
        learnt(tokenizer, "{{ raise_exception('no') }}", "hi", "hello")
