"""Commands whose options come from a plugin: `modelgrove compress MODEL --method rtn --bits 4`.

The chosen method's `Params` become click options, in `--help` too; pydantic checks the values.
"""

from __future__ import annotations

from enum import Enum
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

if TYPE_CHECKING:
    from modelgrove_hub.contracts import Params, Plugin

_METHOD = "modelgrove.method"


class MethodCommand(click.Command):
    """A command for all plugins of one kind; `--method` picks one and brings its options.

    With `only` it is for the one plugin `default`, and there is no `--method`.
    """

    def __init__(self, *args: Any, kind: str, default: str, only: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind, self.default, self.only = kind, default, only
        if not only:
            self.params.append(click.Option(["--method"], default=default, show_default=True, help=f"Which {kind}."))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find `--method` first, so that the parser knows the method's options."""
        ctx.meta[_METHOD] = (None if self.only else _peek(args)) or self.default
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then the method's."""
        own = super().get_params(ctx)
        taken = {parameter.name for parameter in own}
        plugin = chosen_plugin(self.kind, ctx.meta.get(_METHOD, self.default))
        return own + [option for option in options_of(plugin.Params) if option.name not in taken]


def chosen_plugin(kind: str, method: str) -> type[Plugin]:
    """The plugin of `kind` called `method`.

    Raises:
        NotFoundError: there is none; the message lists what there is.
    """
    from modelgrove_hub.plugins import get_plugin

    return get_plugin(f"{kind}.{method}")


def options_of(params: type[Params]) -> list[click.Option]:
    """One click option a field; unset options are left to the field's own default."""
    return [_option(name, field) for name, field in params.model_fields.items()]


def given(params: type[Params], values: dict[str, Any]) -> dict[str, Any]:
    """The values that the user gave for fields of `params`."""
    chosen = {name: values.get(name) for name in params.model_fields}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in chosen.items() if v not in (None, ())}


def _option(name: str, field: Any) -> click.Option:
    flag = "--" + name.replace("_", "-")
    kind, multiple = _click_type(field.annotation)
    default = "" if field.is_required() else f"  [default: {_shown(field.get_default(call_default_factory=True))}]"
    text = (field.description or "") + default
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=text)
    # An explicit default, None too, would satisfy `required`.
    default_none: dict[str, Any] = {} if field.is_required() else {"default": None}
    return click.Option(
        [flag, name], type=kind, multiple=multiple, required=field.is_required(), help=text, **default_none
    )


def _click_type(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not NoneType)
    origin = get_origin(annotation)
    if origin is Literal:
        values = get_args(annotation)
        return (click.Choice(list(values)) if isinstance(values[0], str) else type(values[0])), False
    if origin in (list, tuple):
        return _click_type(get_args(annotation)[0])[0], True
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return click.Choice([member.value for member in annotation]), False
    return (annotation if annotation in (bool, int, float, str) else str), False


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _peek(args: list[str]) -> str | None:
    for place, argument in enumerate(args):
        if argument.startswith("--method="):
            return argument.partition("=")[2]
        if argument == "--method" and place + 1 < len(args):
            return args[place + 1]
    return None
