"""A PyTorch classifier that a user brings: their code makes it, their checkpoint fills it.

Enters: `package.module:function`, a checkpoint file, the convention of its input. Leaves: a
`BroughtModel`, frozen and in eval mode, of the deployed convention (pixels in, logits out), whose
checks against the data are in `harness.models.brought_checks`.
Calling the function runs the user's code. The checkpoint is read as data only.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.data.torchvision_shim import import_torchvision
from harness.models.brought_weights import fill, one_line, read_state
from harness.records import CONTROLS, DEPLOYABLE, HarnessError, UsageError
from harness.sources import FLEET
from harness.streams import stdout_spared

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
OURS = ("harness", "export", "devices", "reports")
"""The top-level packages of this distribution."""
RESERVED, RESERVED_ENDINGS = ("tuning",), ("_compat",)
"""Of other files in `cache/`, as `harness.workspace` names them."""


@dataclass(frozen=True)
class Convention:
    """What a model expects of pixels: x * input_range / 255, then (x - mean) / std."""

    input_range: int = 1
    """1: floats in [0, 1], as torchvision's ToTensor gives; 255: floats in 0..255."""
    mean: tuple[float, ...] = ()
    """One value a channel, or one for all; in units of `input_range`. Empty: not normalised."""
    std: tuple[float, ...] = ()

    def options(self) -> str:
        """As it is written on the command line."""
        words = [f"--input-range {self.input_range}"]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values:
                words.append(f"--{name} {','.join(f'{v:.4g}' for v in values)}")
        return " ".join(words)


@dataclass(frozen=True)
class Recipe:
    """How to make a user's model."""

    factory: str
    """`package.module:function`."""
    checkpoint: Path | None
    name: str
    convention: Convention


class BroughtModel(nn.Module):
    """Pixels float [N, C, H, W] in [0, 255] -> what the user's network returns, logits [N, K]."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, network: nn.Module, convention: Convention) -> None:
        super().__init__()
        self.network = network
        self.input_range = convention.input_range
        mean, std = convention.mean, convention.std
        self.register_buffer("mean", _per_channel(mean) if mean else None)
        self.register_buffer("std", _per_channel(std) if std else None)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        # Crafting lays pixels out with channels last, and .view(N, -1) in their code refuses what
        # follows. A clone, not contiguous(): that keeps such strides where there is one channel.
        x = pixels.clone(memory_format=torch.contiguous_format)
        if self.input_range == 1:
            x = x / 255
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        logits: Tensor = self.network(x)
        return logits


def make_convention(
    input_range: int, mean: tuple[float, ...], std: tuple[float, ...], *, channels: int
) -> Convention:
    """The convention, checked.

    Raises:
        UsageError: values that are not one a channel (or one for all), out of range, or a mean in
            other units than `input_range`.
    """
    for option, values in (("--mean", mean), ("--std", std)):
        if values and len(values) not in (1, channels):
            raise UsageError(
                f"{option} has {len(values)} values, but images here have {channels} "
                f"channel{'s' if channels > 1 else ''}: give one value a channel, or one for all"
            )
    if any(not 0 < value < float("inf") for value in std):
        raise UsageError(f"--std {_listed(std)} must be above 0")
    if any(not -input_range <= value <= input_range for value in mean):
        raise UsageError(
            f"--mean {_listed(mean)} is outside pixels in [0, {input_range}]: --mean and --std are "
            "in units of --input-range (1, as in torchvision's Normalize, or 255)"
        )
    return Convention(input_range, _shortest(mean), _shortest(std))


def _shortest(values: tuple[float, ...]) -> tuple[float, ...]:
    """One value for all channels where they have the same: one convention, one way to write it."""
    return values[:1] if len(set(values)) == 1 else values


def check_name(name: str, *, given: bool) -> None:
    """Refuse a name that files or rows could not carry.

    Raises:
        UsageError: not a plain word, or taken by a variant or a control.
    """
    hint = "" if given else " (from the factory's name); choose one with --name"
    if not NAME.fullmatch(name) or "_eps" in name:
        raise UsageError(
            f"--name {name}: a name has letters, digits, - and _, starts with a letter, and does "
            f"not hold _eps{hint}"
        )
    same = name.lower()  # as file systems have it that know no capitals
    if same in (*DEPLOYABLE, *CONTROLS) or same.startswith(FLEET):
        raise UsageError(f"--name {name} is what a variant, a control or a fleet is called{hint}")
    if same in RESERVED or same.endswith(RESERVED_ENDINGS):
        raise UsageError(f"--name {name} is what another file of the workspace is called{hint}")


def load_brought(recipe: Recipe) -> BroughtModel:
    """Import the user's function, call it, load the checkpoint.

    Raises:
        UsageError: whatever goes wrong on the way, in one line.
    """
    network = make_network(recipe.factory)
    if recipe.checkpoint is not None:
        with theirs(f"checkpoint {recipe.checkpoint}: loading it into {recipe.factory}"):
            fill(network, read_state(recipe.checkpoint), recipe.checkpoint, of=recipe.factory)
    return BroughtModel(network, recipe.convention)


def parse_factory(factory: str) -> tuple[str, str]:
    """(module, function) of `package.module:function`; the function may be of a class.

    Raises:
        UsageError: not of that form.
    """
    module_name, _, attribute = factory.partition(":")
    if not all(word.isidentifier() for word in (*module_name.split("."), *attribute.split("."))):
        raise UsageError(
            f"--factory {factory}: write PACKAGE.MODULE:FUNCTION, such as mymodels.net:make"
        )
    return module_name, attribute


def make_network(factory: str) -> nn.Module:
    """What `package.module:function` returns when it is called without arguments.

    Raises:
        UsageError: not of that form, not importable, not callable, raises, returns no module.
    """
    module_name, attribute = parse_factory(factory)
    if module_name.partition(".")[0] in OURS:
        raise UsageError(
            f"--factory {factory}: {module_name.partition('.')[0]} is a package of the harness "
            "itself: call your module something else"
        )
    make: Any = _import(module_name)
    for part in attribute.split("."):
        if not hasattr(make, part):
            where = getattr(sys.modules[module_name], "__file__", None) or "built in"
            raise UsageError(f"--factory {factory}: {module_name} ({where}) has no {part!r}")
        make = getattr(make, part)
    if isinstance(make, nn.Module):
        return make
    if not callable(make):
        raise UsageError(
            f"--factory {factory} is a {type(make).__name__}, not a function that returns a model"
        )
    with theirs(f"--factory {factory}: calling it without arguments"):
        network = _with_torchvision(make)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"--factory {factory} returned a {type(network).__name__}, not a torch.nn.Module"
        )
    return network


def _import(name: str) -> Any:
    # Last, so that nothing of theirs takes the place of a package imported later.
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        with theirs(f"--factory: importing {name}", keep=ModuleNotFoundError):
            return _with_torchvision(lambda: importlib.import_module(name))
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise UsageError(
                f"--factory: there is no module {name} in this folder or on the Python path: go to "
                "the folder that holds it, or set PYTHONPATH"
            ) from None
        raise UsageError(
            f"--factory: importing {name} needs the module {missing!r}, which is not installed here"
        ) from None


def _with_torchvision(call: Callable[[], Any]) -> Any:
    """What the call returns; once more where it met a torchvision that cannot be imported."""
    try:
        return call()
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        import_torchvision()  # declares the operators that the CPU build lacks
        return call()


@contextmanager
def theirs(doing: str, *, keep: type[Exception] | None = None) -> Iterator[None]:
    """Whatever the user's code raises becomes one line; so does memory that is not enough.

    Args:
        doing: what was going on, the beginning of that line.
        keep: a kind of exception that the caller looks at itself.

    Raises:
        UsageError: the user's code raised.
        HarnessError: out of memory.
    """
    try:
        # What their code prints is no data of ours, and their warnings are theirs.
        with warnings.catch_warnings(), stdout_spared():
            warnings.simplefilter("default")
            yield
    except HarnessError:
        raise
    except (Exception, SystemExit) as error:
        if keep is not None and isinstance(error, keep):
            raise
        raise _blamed(doing, error) from None


def _blamed(doing: str, error: BaseException) -> BaseException:
    """What the user is told of an error of their code; the error itself while they debug."""
    if is_out_of_memory(error):
        return HarnessError(f"{doing} ran out of memory: {MEMORY_HINT}")
    if os.environ.get("HARNESS_DEBUG"):
        return error
    return UsageError(f"{doing} raised {one_line(error)} (HARNESS_DEBUG=1 shows where)")


class Blamed(nn.Module):
    """The model, whose errors are said to be its own; for use beside other work.

    `theirs` is not: it changes what the whole process prints and warns of.
    """

    def __init__(self, model: nn.Module, doing: str, *, alone: bool = False) -> None:
        super().__init__()
        self.model, self.doing = model, doing
        self.alone = alone  # one image a call

    def forward(self, pixels: Tensor) -> Tensor:
        try:
            parts = pixels.split(1) if self.alone else (pixels,)
            logits = torch.cat([self.model(part) for part in parts])
        except Exception as error:
            raise _blamed(self.doing, error) from None
        return logits


MEMORY_HINT = (
    "lower craft.inner_batch (attack sgd: craft.batch_size) in harness.toml, or take "
    "--accelerator cpu"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python had no memory left, on a CPU or a GPU."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
