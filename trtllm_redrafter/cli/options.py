"""Options shared by the commands. What a setting means and its default are read from the recipe's schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from trtllm_redrafter.settings import Resolved, flag_layers, resolve, set_layer
from trtllm_redrafter.settings.layers import show
from trtllm_redrafter.settings.schema import keys
from trtllm_redrafter.settings.sources import template_arguments

_DESCRIPTIONS = keys()
_NOTHING_GIVEN = resolve([])

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and where every value comes from; write nothing.")
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe; repeatable.")
]
TEMPLATE_KWARGS = "--chat-template-kwargs"
TemplateKwargs = Annotated[
    list[str] | None,
    typer.Option(
        TEMPLATE_KWARGS,
        metavar="KEY=JSON",
        help="Argument of the chat template, as enable_thinking=false; repeatable.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of this program.")]


def setting(key: str, *flags: str, metavar: str | None = None, required: bool = False) -> Any:
    """A typer option for a recipe key. Not given means None here: the recipe fills in its default.

    A required one is missed by the room that needs it, together with everything else that is wrong.
    """
    text, default = _DESCRIPTIONS[key], _NOTHING_GIVEN.value(key)
    if required:
        text = text.partition(";")[0] + " (required)"
    elif default is not None and default not in ((), {}):
        text += f" (default: {show(default)})"
    return typer.Option(*flags, help=text, metavar=metavar, show_default=False)


def template_flag(pairs: Sequence[str] | None) -> dict[str, tuple[str, Any]]:
    """The entry of `--chat-template-kwargs` among a command's flags."""
    return {"chat_template_kwargs": (TEMPLATE_KWARGS, template_arguments(pairs, TEMPLATE_KWARGS))}


def from_flags(flags: Mapping[str, tuple[str, Any]], changes: Sequence[str] | None = None) -> Resolved:
    """Flags over `--set key=value` over defaults; an empty list counts as not given."""
    given = {key: (flag, None if value == [] else value) for key, (flag, value) in flags.items()}
    return resolve([*([set_layer(changes)] if changes else []), *flag_layers(given)])
