"""Options of the commands. One that sets a key of the recipe takes its type, help text and default from the schema.

@with_settings(flag("checkpoint", required=True), *flags("build"))
def build(given: list[Layer], dry_run: DryRun = False) -> None:      # --checkpoint, --max-batch-size, ..., --set
    resolved = resolve(given)
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from trtllm_redrafter.settings import flag_layers, set_layer
from trtllm_redrafter.settings.layers import show
from trtllm_redrafter.settings.schema import SECTIONS, keys
from trtllm_redrafter.settings.sources import template_arguments

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and where every value comes from; write nothing.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of this program.")]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe; repeatable.")
]

Function = Callable[..., None]


@dataclass(frozen=True)
class Flag:
    """A command's flag for one key of the recipe.

    `names` are typer's: `--greedy/--sampling` for yes and no, `--base,--model` for two names of one thing.
    """

    key: str
    names: str
    required: bool = False

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter for typer. None means not given: the recipe has the default, and says what is required."""
        field = keys()[self.key]
        kind, metavar = _on_the_command_line(field.annotation)
        text, default = field.description or "", field.default
        if self.required:
            text = text.partition(";")[0] + " (required)"
        elif default is not None and default not in ((), {}):
            text += f" (default: {show(default)})"
        option = typer.Option(*self.names.split(","), help=text, metavar=metavar, show_default=False)
        name = self.key.replace(".", "_")
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )

    def given(self, value: Any) -> tuple[str, Any]:
        """The name it was given by, and its value for the recipe; None when it was not given."""
        name = self.names.split(",")[0].split("/")[1 if value is False and "/" in self.names else 0]
        if value is None or value == []:
            return name, None
        return name, template_arguments(value, name) if keys()[self.key].default == {} else value


def flag(key: str, names: str | None = None, *, required: bool = False) -> Flag:
    """The flag of a recipe key, named after it where `names` does not say otherwise."""
    words = key.rpartition(".")[2].replace("_", "-")
    is_switch = _on_the_command_line(keys()[key].annotation)[0] is bool
    return Flag(key, names or (f"--{words}/--no-{words}" if is_switch else f"--{words}"), required)


def flags(section: str, *only: str, **names: str) -> list[Flag]:
    """The flags of a section's keys, all or `only` some; `names` are those that differ from the key's."""
    return [flag(f"{section}.{key}", names.get(key)) for key in only or SECTIONS[section].model_fields]


def with_settings(*rows: Flag) -> Callable[[Function], Function]:
    """Give a command the flags `rows` and `--set`; its first argument receives them as recipe layers."""

    def decorate(command: Function) -> Function:
        def run(**values: Any) -> None:
            changes = values.pop("changes")
            given = {row.key: row.given(values.pop(row.parameter.name)) for row in rows}
            command([*([set_layer(changes)] if changes else []), *flag_layers(given)], **values)

        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        ]
        more = inspect.Parameter("changes", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_Set)
        parameters = [*(row.parameter for row in rows), more, *own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _on_the_command_line(annotation: Any) -> tuple[Any, str | None]:
    """The type that typer parses for a field's type, and what its help shows in place of that type's name."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _on_the_command_line(arguments[0])
    if origin in (Union, types.UnionType):
        return _on_the_command_line(next(a for a in arguments if a is not type(None)))
    if origin is Literal:  # the schema refuses others, together with all else that is wrong
        return str, "|".join(arguments)
    if origin is tuple:
        return list[_on_the_command_line(arguments[0])[0]], None  # type: ignore[misc]
    if origin is dict:
        return list[str], "KEY=JSON"
    return annotation, None
