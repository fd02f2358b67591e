"""`harness.toml`: read, checked, and written with what every key means.

Enters: TOML text, or a `Config`. Leaves: the other of them. Unknown keys, wrong types and
impossible values are errors that name the key. Comments are the docstrings below the fields of
`harness.config`, so that a key is explained in one place.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from harness.config import Config
from harness.config_rules import check
from harness.overlay import overlay, toml_value
from harness.presets import preset_named
from harness.records import UsageError

WIDTH = 100


def load_config(path: Path) -> Config:
    """Read and check a `harness.toml`; keys it leaves out come from its preset.

    Raises:
        UsageError: unreadable, malformed, an unknown key, a wrong type or an impossible value.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: write it anew with `harness init`") from None
    except (ValueError, RecursionError) as error:  # also numbers too long, lists too deep
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    if not values:
        raise UsageError(
            f"{path} says nothing: put back what it said, or delete it and write one with"
            " `harness init`"
        )
    return config_from_dict(values, where=path.name)


def config_from_dict(values: dict[str, Any], *, where: str = "harness.toml") -> Config:
    """Overlay `values` on their preset's defaults and check the result."""
    preset, dataset = values.get("preset", "quickstart"), values.get("dataset")
    if not isinstance(preset, str):
        raise UsageError(f"{where}: preset must be text, got {preset!r}")
    if dataset is not None and not isinstance(dataset, str):
        raise UsageError(f"{where}: dataset must be text, got {dataset!r}")
    base = preset_named(preset, dataset=dataset)
    if values.get("protocol") == "paper":
        base = replace(base, attack="sgd")  # the authors' protocol is of the authors' attack
    config = overlay(base, values, where=where, prefix="")
    assert isinstance(config, Config)
    check(config, where)
    return config


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
