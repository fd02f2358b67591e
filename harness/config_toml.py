"""The experiment as text: a `Config` -> `harness.toml`, every key with what it means.

Enters: a `Config`. Leaves: TOML that `harness.config.load_config` reads back unchanged. Comments
are the docstrings below the fields, so that a key is explained in one place.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import fields
from typing import Any

from harness.config import Config
from harness.overlay import toml_value

WIDTH = 100


def to_toml(config: Config) -> str:
    """The whole configuration as commented TOML."""
    lines = [
        "# One experiment. Change a value and `harness run` rebuilds only what depends on it.",
        "# Units: eps in 1/255; rates as fractions.",
    ]
    meaning, tables = _meanings(type(config)), list[str]()
    for item in fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            tables += ["", f"[{item.name}]"]
            inner = _meanings(type(value))
            for each in fields(value):
                tables += _entry(each.name, getattr(value, each.name), inner.get(each.name, ""))
        else:
            lines += _entry(item.name, value, meaning.get(item.name, ""))
    return "\n".join(lines + tables) + "\n"


def _entry(name: str, value: Any, meaning: str) -> list[str]:
    prefix = "# "
    comment = textwrap.wrap(
        meaning, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
    )
    return [*comment, f"{name} = {toml_value(value)}"]


def _meanings(of: type) -> dict[str, str]:
    """Field -> the docstring below it, on one line; of a class whose source is at hand."""
    try:
        source = inspect.getsource(of)
    except OSError:  # installed without its sources: nothing to explain the keys with
        return {}
    (tree,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str() as doc)),
            ):
                found[name] = " ".join(doc.split())
    return found
