"""Chat templates as transformers renders them, with limits on the memory a template can use.

A template comes with a model, from any source, and is a program. Jinja's sandbox keeps it from the machine's files, but
not from `'a' * 10**9`, from text that doubles in a loop, or from `"%999999999d"`. Here every operation that can make
something large is checked before, and its result after. `time_limit` ends loops.

The environment is transformers' own in everything a template can see: whitespace, `tojson`, `raise_exception`,
`strftime_now`, loop controls, `{% generation %}`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 64 * 2**20
"""Limit of a text or list in a template, and of its output."""

MAX_BITS = 2**16
"""Limit of an integer."""

MARKS = "_generation_marks_"
"""Template variable: the marks put around the content of `{% generation %}`; if absent, nothing is marked."""

_WIDE = re.compile(r"%[^a-zA-Z%]*\d{7}|\*")


class TooLarge(Exception):
    """A template makes a text, list or number beyond the limits."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: encloses what the assistant generated."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        marks = context.get(MARKS)
        return caller() if marks is None else f"{marks[0]}{caller()}{marks[1]}"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    concat = staticmethod(lambda parts: _joined(parts))

    def from_string(self, source: Any, globals: Any = None, template_class: Any = None) -> jinja2.Template:
        template = super().from_string(source, globals, template_class)
        names: dict[str, Any] = template.root_render_func.__globals__
        names["str_join"] = names["markup_join"] = lambda parts: _joined(map(str, parts))  # of the operator ~
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operation(operator, left, right)
        return _sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if inspect.isbuiltin(__obj) and isinstance(__obj.__self__, (str, bytes)):
            _check_growth(__obj.__name__, __obj.__self__, (*args, *kwargs.values()))
        return _sized(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        format_text = str(value.__self__)

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_numbers((*args, *kwargs.values()))
            if re.search(r"\d{7}", format_text):
                raise TooLarge("a format asks for millions of characters")
            return str(_sized(wrapped(*args, **kwargs)))

        return bounded


@lru_cache(maxsize=1)
def environment() -> BoundedEnvironment:
    return BoundedEnvironment()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON for a model, without escaping for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _joined(parts: Iterable[str]) -> str:
    size, found = 0, []
    for part in parts:
        size += len(part)
        if size > MAX_CHARACTERS:
            raise TooLarge(f"it writes more than {MAX_CHARACTERS:,} characters")
        found.append(part)
    return "".join(found)


def _sized(value: Any) -> Any:
    if isinstance(value, (str, bytes, list, tuple, dict)) and len(value) > MAX_CHARACTERS:
        raise TooLarge(f"it makes something of {len(value):,} parts")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise TooLarge(f"it makes a number of {value.bit_length():,} bits")
    return value


def _check_operation(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
                _check_size(len(sequence) * max(count, 0))
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 1)
        if bits > MAX_BITS:
            raise TooLarge("it makes a number of thousands of digits")
    if operator == "%" and isinstance(left, (str, bytes)):
        _check_growth("format", left, right if isinstance(right, tuple) else (right,))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or environment comes first

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = args[skipped:]
        _check_growth(name, given[0] if given else "", (*given[1:], *kwargs.values()))
        return _sized(function(*args, **kwargs))

    return bounded


def _check_growth(name: str, value: Any, args: tuple[Any, ...]) -> None:
    """Check filters and string methods whose output can be far larger than their input."""
    _check_numbers(args)
    size = len(value) if isinstance(value, (str, bytes, list, tuple, Mapping)) else 1
    numbers = [arg for arg in args if isinstance(arg, int)]
    if name in ("indent", "center", "ljust", "rjust", "zfill", "expandtabs", "batch", "tojson") and numbers:
        _check_size(size * max(numbers))
    if name == "tojson" and max(numbers, default=0) > 256:
        raise TooLarge("it indents JSON by hundreds of characters")
    if name == "replace" and len(args) > 1 and all(isinstance(x, str) for x in (value, args[0], args[1])):
        _check_size(size + (value.count(args[0]) if args[0] else size + 1) * len(args[1]))
    if name == "join" and isinstance(value, str) and args and isinstance(args[0], (list, tuple)):
        _check_size(sum(len(str(part)) + size for part in args[0]))
    if name == "join" and isinstance(value, (list, tuple)):
        between = len(str(args[0])) if args else 0
        _check_size(sum((len(part) if isinstance(part, str) else 1) + between for part in value))
    if name == "format" and _WIDE.search(str(value)):
        raise TooLarge("a format asks for millions of characters")


def _check_numbers(args: tuple[Any, ...]) -> None:
    for arg in args:
        if isinstance(arg, int) and abs(arg) > MAX_CHARACTERS:
            raise TooLarge(f"it asks for {arg:,} of something" if abs(arg) < 2**63 else "it asks for endless text")


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TooLarge(f"it asks for {size:,} characters" if size < 2**63 else "it asks for endless text")
