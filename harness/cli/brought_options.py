"""Options by which a user brings a PyTorch model of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from harness.records import UsageError

if TYPE_CHECKING:
    from harness.pipeline.brought import Brought
    from harness.pipeline.context import Context

Command = TypeVar("Command", bound=Callable[..., Any])


class Numbers(click.ParamType[tuple[float, ...]]):
    """Comma-separated numbers: 0.485,0.456,0.406."""

    name = "numbers"

    def convert(
        self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None
    ) -> tuple[float, ...]:
        """A tuple of floats; refuses what is none."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers: write it like 0.485,0.456,0.406")


@dataclass(frozen=True)
class BroughtOptions:
    """What was given; `factory` None: no model is brought."""

    factory: str | None
    checkpoint: Path | None
    name: str | None
    input_range: str | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def __bool__(self) -> bool:
        return self.factory is not None

    def check(self) -> None:
        """Refuse options of a model without the model.

        Raises:
            UsageError: naming the option.
        """
        for option in ("checkpoint", "name", "input_range", "mean", "std"):
            if getattr(self, option) is not None and self.factory is None:
                flag = option.replace("_", "-")
                raise UsageError(
                    f"--{flag} is of a model you bring: say with --factory PKG:FN what makes it"
                )

    def load(self, context: Context) -> Brought:
        """Make the model: this runs the user's code.

        Raises:
            UsageError: anything that keeps it from being attacked on the workspace's images.
        """
        from harness.models.brought import Recipe, check_name, make_convention, parse_factory
        from harness.pipeline.brought import Brought

        assert self.factory is not None
        name = self.name or parse_factory(self.factory)[1].rpartition(".")[2]
        check_name(name, given=self.name is not None)
        convention = make_convention(
            int(self.input_range or 1),
            self.mean or (),
            self.std or (),
            channels=context.image_shape[0],
        )
        brought = Brought(context, Recipe(self.factory, self.checkpoint, name, convention))
        _ = brought.identity  # made and checked before anything else is done
        if brought.reading.warning:
            context.reporter.note(brought.reading.warning)
        return brought


def brought_options(command: Command) -> Command:
    """`--factory` and what belongs to it; the command takes them as `brought`."""

    @click.option(
        "--factory",
        metavar="PKG:FN",
        help="Your own PyTorch classifier: FN of module PKG is imported and called without "
        "arguments, and returns a torch.nn.Module. This runs your code.",
    )
    @click.option(
        "--checkpoint",
        type=click.Path(path_type=Path),
        help="Its weights: a state dict, or a dictionary with one. Read as data, never executed. "
        " [default: as FN returns it]",
    )
    @click.option("--name", help="What to call it in files and results.  [default: FN]")
    @click.option(
        "--input-range",
        type=click.Choice(["1", "255"]),
        help="What your model takes: floats in [0, 1] or in 0..255.  [default: 1]",
    )
    @click.option(
        "--mean",
        type=Numbers(),
        help="Subtracted from that, a value a channel: 0.485,0.456,0.406.  [default: nothing]",
    )
    @click.option(
        "--std", type=Numbers(), help="Divided by, a value a channel.  [default: nothing]"
    )
    @functools.wraps(command)
    def collected(
        *,
        factory: str | None,
        checkpoint: Path | None,
        name: str | None,
        input_range: str | None,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        **others: Any,
    ) -> Any:
        brought = BroughtOptions(factory, checkpoint, name, input_range, mean, std)
        return command(brought=brought, **others)

    return collected  # type: ignore[return-value]  # the same command, with other options
