"""The `harness` command: options every command shares, and how errors end.

Standard output is data, standard error is progress. Heavy imports wait until a command needs
them, so that `--help` is quick.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from devices.plain import plain
from harness.cli import attack, audit, build, devices, experiment, exporting, inspect
from harness.records import HarnessError

INTERRUPTED = 130


def _print_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    """The installed version, or that of the source tree this runs from without an install."""
    import tomllib

    if not wanted:
        return
    try:
        version = importlib.metadata.version("uap-edge-harness")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        version = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    click.echo(version)
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Which compression method survives universal attacks, measured where the model runs.

    \b
    Examples:
      harness run                                everything, in this folder
      harness export --all                       every variant to ONNX, checked
      harness attack-device --device local --uap cache/full_eps10.pt
      harness report                             the trade-off per compression method
    """


for command in (
    experiment.init,
    experiment.run,
    experiment.plan,
    build.train,
    build.craft,
    exporting.export,
    attack.attack_device,
    audit.audit,
    devices.devices,
    inspect.report,
    inspect.results,
    inspect.doctor,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; every failure is one line and an exit code, never a traceback."""
    # OpenMP threads that spin long while they wait make small models tens of times slower as
    # soon as another process wants a core. Read when torch is imported, later than this.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # onnxruntime 1.29 and later report model names and hashes to their maker unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    stdout = sys.stdout
    try:
        code = cli.main(standalone_mode=False, prog_name="harness")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted: nothing is half-written; the same command continues")
        sys.exit(INTERRUPTED)
    except HarnessError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _reader_left()
    except SystemExit:
        if sys.stdout is stdout:
            raise
        _reader_left()  # click met it first, put another stdout there, and would end with 1
    except Exception as error:
        if os.environ.get("HARNESS_DEBUG"):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        _say(f"error: {type(error).__name__}: {reason} (HARNESS_DEBUG=1 shows where)")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _reader_left() -> NoReturn:
    """The reader of standard output went away (`harness results | head`): not our failure."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(0)


def _say(text: str) -> None:
    # A message may quote a file name or a board, and a terminal obeys control characters.
    shown = "\n".join(plain(line) for line in text.splitlines())
    click.echo(shown, err=True)
