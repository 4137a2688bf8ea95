"""Templates as transformers renders them, and those that ask for too much."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines import write_tokenizer
from trtllm_redrafter.errors import RequestError
from trtllm_redrafter.prompts import chat_template
from trtllm_redrafter.prompts.chat_template import ChatTemplate, encode_prompt
from trtllm_redrafter.prompts.messages import Prompt

CHAT = [
    {"role": "system", "content": "s  "},
    {"role": "user", "content": "<&> é\n"},
    {"role": "assistant", "content": "yes", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2]}}}]},
]
QWEN = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
    {{- m.content | trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
OTHERS = [
    "{{ bos_token }}{% for m in messages %}\n  {% if loop.first %}\n    {{ m.role }}\n  {% endif %}\n"
    "{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{{ m['content'].strip() ~ 1 }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ tools is none }}{{ documents is none }}{{ eos_token }}",
    "{{ messages | tojson(indent=2) }}{{ '%s-%d' | format('a', 3) }}{{ '{:>5}'.format(7) }}{{ 'x' * 3 }}{{ 2 ** 8 }}",
    "{% macro say(m) %}[{{ m.role|upper }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}{{ flag }}",
    "{% set x %}{{ messages[0].content }}!{% endset %}{{ x | replace('s', 'tt') | indent(2, true) | center(30) }}",
    QWEN,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("t") / "t"))


@pytest.mark.parametrize("source", OTHERS)
@pytest.mark.parametrize("answer_next", [False, True])
def test_texts_are_those_of_transformers(tokenizer: Any, source: str, answer_next: bool) -> None:
    tokenizer.chat_template = source
    kwargs = {"flag": "f", "enable_thinking": False}
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=answer_next, **kwargs)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    assert template.render(CHAT, kwargs, answer_next=answer_next).text == expected


def test_the_generation_mark(tokenizer: Any) -> None:
    source = (
        "{% macro answer(m) %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{{ answer(m) | trim }}{% else %}"
        "{{ m.content }}{% endif %}\n{% endfor %}"
    )
    template = ChatTemplate(source, {})
    chat = [{"role": r, "content": c} for r, c in (("user", "é"), ("assistant", "a"), ("user", "b"), ("assistant", ""))]
    rendered = template.render(chat, {}, answer_next=False, marked=True)
    assert rendered.spans is not None and rendered.text == template.render(chat, {}, answer_next=False).text
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["a</s>", "</s>"]


def test_several_templates_by_name() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render([], {}, answer_next=True).text == "plain"
    assert template.render([], {"tools": [{}]}, answer_next=True).text == "tools"
    with pytest.raises(RequestError, match="none is the default"):
        ChatTemplate({"rag": "x"}, {}).render([], {}, answer_next=True)


TOO_MUCH = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * [1] }}",
    "{{ 7 ** (10**9) }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99999) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99999) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=999999999) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ 'a' | center(999999999) }}",
    "{{ [1] | batch(999999999, 0) | list }}",
    "{{ ('a' * 9999999).replace('a', 'b' * 99) }}",
    "{{ ('a' * 9999999) | replace('a', 'b' * 99) }}",
    "{{ ('a' * 9999).join(['b'] * 99999) }}",
    "{{ (['b'] * 99999) | join('a' * 9999) }}",
    "{{ messages | tojson(indent=99999) }}",
    "{{ ('\n' * 99999) | indent(99999) }}",
]


@pytest.mark.parametrize("source", TOO_MUCH)
def test_a_template_that_writes_without_measure_is_stopped(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(RequestError, match="output is too large") as caught:
        ChatTemplate(source, {}).render(CHAT, {}, answer_next=True)
    assert caught.value.problem.remedy and time.monotonic() - start < 3.0


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_template_that_never_ends_is_stopped_in_any_thread(monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template, said = ChatTemplate(loops, {}), []

    def render() -> None:
        with pytest.raises(RequestError) as caught:
            template.render(CHAT, {}, answer_next=True)
        said.append(caught.value.render())

    def four_times() -> None:
        for _ in range(4):
            render()

    start = time.monotonic()
    if elsewhere:
        thread = threading.Thread(target=four_times)
        thread.start()
        thread.join()
    else:
        four_times()
    assert len(said) == 4 and all("has not ended after" in text for text in said)
    assert "not tried again" in said[3] and time.monotonic() - start < 10
    assert ChatTemplate("fine", {}).render(CHAT, {}, answer_next=True).text == "fine"


def test_the_time_limit_leaves_the_interpreter_as_it_was() -> None:
    """An exception that is taken back before it is raised makes CPython 3.11 loop for ever once something traces."""
    program = (
        "import sys\nfrom trtllm_redrafter.prompts.time_limit import TimeExpired, time_limit\n"
        "with time_limit(5):\n    pass\n"
        "try:\n    with time_limit(0.01):\n        while True:\n            pass\n"
        "except TimeExpired:\n    print('stopped')\n"
        "sys.settrace(lambda *_: None)\n"
        "def loop():\n    for i in range(1000):\n        len('x')\n"
        "loop()\nprint('traced')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["stopped", "traced"], done.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{", "unexpected"),
        ("{{ messages[0].role.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("x" * 2**21, "has 2,097,152 characters"),
    ],
)
def test_refusals_of_a_template_are_messages(source: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ChatTemplate(source, {}).render(CHAT, {}, answer_next=True)


def test_prompts_through_the_template_or_without(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ mood }}"
    template = ChatTemplate.of(tokenizer)

    def text(prompt: Prompt) -> str:
        return str(tokenizer.decode(encode_prompt(tokenizer, template, prompt)))

    assert text(Prompt("a", template_kwargs={"mood": "!"})) == "<a>!"
    assert text(Prompt("a", chat=False)) == text(Prompt("a", chat=False).for_model(has_template=True)) == "a"
    chat = Prompt(({"role": "user", "content": "b"},))
    assert text(chat) == "<b>"
    with pytest.raises(RequestError, match="no chat template"):
        encode_prompt(tokenizer, None, replace(chat, chat=True))
    assert tokenizer.decode(encode_prompt(tokenizer, None, Prompt("a"))) == "a"
    plain = Prompt(tuple(CHAT), template_kwargs={"mood": "?"}).for_model(has_template=False)
    assert tokenizer.decode(encode_prompt(tokenizer, None, plain)) == "s  \n<&> é\n\nyes"
    with pytest.raises(RequestError, match="not valid Unicode"):
        encode_prompt(tokenizer, None, Prompt("a\udcff"))
