"""Forms from parameters, and parameters from forms."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, Field

from modelgrove_hub.contracts import Kind, Params
from modelgrove_hub.plugins import load_plugins
from modelgrove_hub.web.forms import Filled, faults, fields_of, fill


class Shade(StrEnum):
    DARK = "dark"
    LIGHT = "light"


class Inner(BaseModel):
    depth: int = 1


class Example(Params):
    needed: str = Field(pattern="^[a-z]+$", description="A word.")
    count: int = Field(3, ge=1, lt=10)
    share: float | None = Field(None, gt=0, le=1)
    on: bool = True
    bits: Literal[8, 4] = 8
    shade: Shade | None = None
    words: tuple[str, ...] = ("a", "b")
    sizes: list[int] = Field([], max_length=2)
    nested: Inner = Inner()
    either: int | str = 1


class Plugin:
    name: ClassVar[str] = "example"
    kind: ClassVar[Kind] = Kind.ANALYZER
    Params: ClassVar[type[Params]] = Example


def filled(**values: str | list[str]) -> dict[str, Any]:
    given = {name: [value] if isinstance(value, str) else value for name, value in values.items()}
    return fill(fields_of(Example.model_json_schema()), Filled(given))


def test_a_field_for_every_parameter_the_needed_one_first():
    fields = {field.name: field for field in fields_of(Example.model_json_schema())}
    assert next(iter(fields)) == "needed"
    assert [field.kind for field in fields.values()] == [
        "text", "integer", "number", "boolean", "choice", "choice", "list", "list", "json", "json",
    ]  # fmt: skip
    assert fields["needed"].required
    assert fields["needed"].attributes == {"pattern": "^[a-z]+$"}
    assert fields["count"].attributes == {"step": 1, "min": 1, "max": 9}
    assert fields["share"].attributes["max"] == 1
    assert fields["on"].value == "on"
    assert (list(fields["bits"].choices), fields["bits"].value) == (["8", "4"], "8")
    assert list(fields["shade"].choices) == ["dark", "light"]
    assert fields["words"].placeholder == "a, b"


def test_what_is_filled_in_becomes_parameters():
    values = filled(
        needed="word", count="5", share="0.5", on="on", bits="4", shade="dark", words="x y\n\nz\r\n", sizes=["1", "2"],
        nested='{"depth": 2}', either='"7"',
    )  # fmt: skip
    made = Example.model_validate(values)
    assert made == Example(
        needed="word", count=5, share=0.5, on=True, bits=4, shade=Shade.DARK, words=("x y", "z"), sizes=[1, 2],
        nested=Inner(depth=2), either="7",
    )  # fmt: skip


def test_what_is_left_empty_is_left_to_its_default_and_a_box_without_a_tick_is_no():
    assert Example.model_validate(filled(needed="word")) == Example(needed="word", on=False)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "needed"),
        ({"needed": "NO"}, "needed"),
        ({"needed": "a", "count": "10"}, "count"),
        ({"needed": "a", "count": "many"}, "count"),
        ({"needed": "a", "count": "1e400"}, "count"),
        ({"needed": "a", "share": "0"}, "share"),
        ({"needed": "a", "bits": "5"}, "bits"),
        ({"needed": "a", "sizes": "1\ntwo"}, "sizes"),
        ({"needed": "a", "nested": "{"}, "nested"),
        ({"needed": "a", "nested": "[" * 5000}, "nested"),
    ],
)
def test_faults_are_told_by_parameter(values, name):
    assert list(faults(Plugin, filled(**values))) == [name]


def test_every_installed_plugin_has_a_form_whose_defaults_fit():
    plugins = [state.plugin for state in load_plugins() if state.plugin]
    assert len(plugins) > 40
    for plugin in plugins:
        fields = fields_of(plugin.Params.model_json_schema())
        assert [field.name for field in fields if field.kind == "json"] == [], plugin.name
        posted = {field.name: [field.value] for field in fields if field.value}
        missing = {field.name for field in fields if field.required}
        assert faults(plugin, fill(fields, Filled(posted))).keys() <= missing | {""}
