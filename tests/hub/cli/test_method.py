"""Options made from a plugin's parameters."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from modelgrove_hub.cli.method import given, options_of
from modelgrove_hub.contracts import Params


class Shape(StrEnum):
    ROUND = "round"
    FLAT = "flat"


class Everything(Params):
    count: int = Field(3, description="How many.")
    share: float | None = None
    loud: bool = True
    mode: Literal["fast", "good"] = "fast"
    bits: Literal[4, 8] = 8
    shape: Shape = Shape.ROUND
    weights: tuple[float, ...] = ()
    names: list[str] = Field(default_factory=list)
    needed: str


def parse(*arguments):
    caught = {}

    @click.command(params=options_of(Everything))
    def command(**values):
        caught.update(given(Everything, values))

    result = CliRunner().invoke(command, list(arguments))
    return result, caught


def test_unset_options_are_left_to_the_defaults():
    assert parse("--needed", "x")[1] == {"needed": "x"}


def test_every_kind_of_field_is_an_option():
    arguments = (
        "--count 5 --share .5 --no-loud --mode good --bits 4 --shape flat --weights 1 --weights 2 --names a --needed x"
    )
    result, caught = parse(*arguments.split())
    assert result.exit_code == 0, result.output
    assert Everything(**caught) == Everything(
        count=5,
        share=0.5,
        loud=False,
        mode="good",
        bits=4,
        shape=Shape.FLAT,
        weights=(1.0, 2.0),
        names=["a"],
        needed="x",
    )


def test_help_shows_meaning_and_default():
    text = parse("--help")[0].output
    assert "How many." in text
    assert "[default: 3]" in text


@pytest.mark.parametrize("arguments", [["--mode", "slow", "--needed", "x"], ["--count", "many", "--needed", "x"], []])
def test_wrong_values_are_refused(arguments):
    assert parse(*arguments)[0].exit_code == 2
