"""Plain values, as TOML gives them, over a frozen dataclass and the tables in it.

Enters: a dataclass of defaults and a dictionary. Leaves: the dataclass with what was given.
Unknown keys and wrong types are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

from harness.records import UsageError


def toml_value(value: Any) -> str:
    """One value as TOML."""
    # Text, numbers, booleans and flat lists are written alike in JSON and TOML.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def overlay(base: Any, values: dict[str, Any], *, where: str, prefix: str) -> Any:
    """`base` with `values` in the place of its own, checked key by key.

    Raises:
        UsageError: an unknown key or a wrong type; it is named with `where` and `prefix`.
    """
    hints = get_type_hints(type(base))
    known = {item.name for item in fields(base)}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            close = ", ".join(sorted(known))
            raise UsageError(f"{where}: unknown key {name!r}; known here: {close}")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise UsageError(f"{where}: {name!r} must be a table, [{name}]")
            changes[key] = overlay(current, value, where=where, prefix=f"{name}.")
        else:
            changes[key] = _coerce(value, hints[key], where=where, name=name)
    return replace(base, **changes)


def _coerce(value: Any, hint: Any, *, where: str, name: str) -> Any:
    """`value` as the field's type: exact for text, whole numbers and lists; 1 is fine for 1.0."""
    options = get_args(hint) if hint is not str and type(hint).__name__ == "UnionType" else (hint,)
    for option in options:
        if option is bool and isinstance(value, bool):
            return value
        if option is str and isinstance(value, str):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if option is float and is_number and abs(value) <= sys.float_info.max:
            return float(value)
        if getattr(option, "__origin__", None) is tuple and isinstance(value, list):
            element = get_args(option)[0]
            return tuple(
                _coerce(v, element, where=where, name=f"{name}[{i}]") for i, v in enumerate(value)
            )
    wanted = " or ".join(_plain(option) for option in options)
    raise UsageError(f"{where}: {name} must be {wanted}, got {value!r}")


def _plain(hint: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(
        hint,
        "a list of " + _plain(get_args(hint)[0]).removeprefix("a ") + "s"
        if get_args(hint)
        else str(hint),
    )
