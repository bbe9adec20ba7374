"""Forms for a plugin's parameters, made from their JSON schema, and what was filled in as parameters again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from modelgrove_hub.contracts import Plugin


class Filled(dict[str, list[str]]):
    """What a form posted: all values by name."""

    def one(self, name: str) -> str:
        """The last value, without the space around it; empty if there is none."""
        return (self.get(name) or [""])[-1].strip()


@dataclass
class Field:
    """An input of a form."""

    name: str
    label: str
    help: str
    kind: str
    """integer, number, text, choice, boolean, list or json."""
    required: bool
    value: str = ""
    """As it stands in the input; of booleans "on" or nothing."""
    placeholder: str = ""
    choices: dict[str, Any] = field(default_factory=dict)
    """What may be chosen, as it is shown, with the value that it stands for."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Limits that browsers check: min, max, step, pattern, maxlength."""
    item: str = "text"
    error: str = ""


def fields_of(schema: Mapping[str, Any]) -> list[Field]:
    """An input for every parameter, those that must be given first."""
    required, definitions = set(schema.get("required", ())), schema.get("$defs", {})
    made = [
        _field(name, _plain(facts, definitions), required=name in required)
        for name, facts in schema.get("properties", {}).items()
    ]
    return sorted(made, key=lambda one: not one.required)


def fill(fields: list[Field], filled: Filled) -> dict[str, Any]:
    """The parameters that a form gives; what was left empty is left to its default. Inputs keep what was typed.

    What is no number or no JSON stays text, and is refused with the parameter's name by its own check.
    """
    values: dict[str, Any] = {}
    for one in fields:
        one.value = filled.one(one.name)
        if one.kind == "boolean":
            values[one.name] = bool(one.value)
        elif one.kind == "list":
            one.value = "\n".join(filled.get(one.name, []))
            if lines := [line.strip() for line in one.value.splitlines() if line.strip()]:
                values[one.name] = [_read(line, one.item) for line in lines]
        elif one.value:
            values[one.name] = one.choices.get(one.value, _read(one.value, one.kind))
    return values


def faults(plugin: type[Plugin], values: Mapping[str, Any]) -> dict[str, str]:
    """What does not fit, by parameter; "" holds what concerns none or several."""
    try:
        plugin.Params.model_validate(dict(values))
    except ValidationError as error:
        found: dict[str, str] = {}
        for fault in error.errors(include_url=False):
            name = str(fault["loc"][0]) if fault["loc"] else ""
            said = "is needed" if fault["type"] == "missing" else fault["msg"]
            found[name] = f"{found[name]}; {said}" if name in found else said
        return found
    return {}


def _field(name: str, facts: Mapping[str, Any], *, required: bool) -> Field:
    label = name.replace("_", " ")
    about, default = str(facts.get("description", "")), facts.get("default")
    kind, item, shape = _kind(facts)
    made = Field(name, label, about, kind, required, item=item)
    if kind == "boolean":
        made.value = "on" if default else ""
    elif kind == "choice":
        made.choices = {str(one): one for one in shape["enum"]}
        made.value = "" if default is None else str(default)
    else:
        made.placeholder = _written(default, kind)
        made.attributes = dict(_limits(shape, kind))
    return made


def _kind(facts: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any]]:
    """How a value is written, of what a list is, and the part of the schema that holds its limits."""
    if "enum" in facts:
        return "choice", "text", facts
    if "const" in facts:
        return "choice", "text", {"enum": [facts["const"]]}
    known = {"integer": "integer", "number": "number", "string": "text", "boolean": "boolean"}
    if facts.get("type") == "array":
        items: dict[str, Any] = facts.get("items") or next(iter(facts.get("prefixItems", ())), {})
        item = known.get(items.get("type", ""), "json" if items.get("type") else "text")
        return "list", "text" if item == "boolean" else item, facts
    return known.get(str(facts.get("type")), "json"), "text", facts


def _plain(facts: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """A property with its reference followed, and "or nothing" taken off."""
    merged = dict(facts)
    for _ in range(4):
        options = [one for one in merged.pop("anyOf", merged.pop("allOf", ())) if one.get("type") != "null"]
        if len(options) == 1:
            merged = {**options[0], **merged}
        elif options:
            return {**merged, "type": "any"}
        reference = merged.pop("$ref", None)
        if reference is None:
            if not options:
                break
            continue
        merged = {**definitions.get(str(reference).rpartition("/")[2], {}), **merged}
    return merged


def _limits(shape: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    if kind in ("integer", "number"):
        yield "step", 1 if kind == "integer" else "any"
        closer = 1 if kind == "integer" else 0
        for edge, exclusive, sign in (("min", "exclusiveMinimum", 1), ("max", "exclusiveMaximum", -1)):
            if f"{edge}imum" in shape:
                yield edge, shape[f"{edge}imum"]
            elif exclusive in shape:
                yield edge, shape[exclusive] + sign * closer
    if kind == "text":
        yield from (
            (html, shape[name]) for html, name in (("maxlength", "maxLength"), ("pattern", "pattern")) if name in shape
        )


def _read(text: str, kind: str) -> Any:
    try:
        if kind == "integer":
            return int(text)
        if kind == "number":
            return float(text)
        if kind == "json":
            return json.loads(text)
    except (ValueError, RecursionError):
        pass
    return text


def _written(default: Any, kind: str) -> str:
    if default is None or default in ("", [], ()):
        return ""
    if kind == "list":
        return ", ".join(map(str, default))
    return json.dumps(default) if kind == "json" else str(default)
