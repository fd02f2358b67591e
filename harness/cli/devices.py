"""`harness devices`: where models can run, and how the user's own boards join."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.duration_type import DURATION
from harness.cli.options import json_option

if TYPE_CHECKING:
    from devices.profiles import Profile
    from harness.records import Machine


@click.group()
def devices() -> None:
    """The devices inference can run on.

    \b
    Examples:
      harness devices list
      harness devices probe rpi4                       emulated, as long as you add none
      harness devices add rpi4 --host pi@raspberrypi   your own board in its place
      harness devices bootstrap rpi4                   give it what it needs to run models
    """


@devices.command("list")
@json_option
def list_devices(as_json: bool) -> None:
    """Name every device, and say how it would run here.

    \b
    Examples:
      harness devices list
      harness devices list --json
    """
    from devices.profiles import own_settings, profiles, user_file

    path = user_file()
    known, own = profiles(path), own_settings(path)
    if as_json:
        click.echo(json.dumps([_described(p, own=p.name in own) for p in known.values()], indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    from devices.registry import how_it_runs
    from harness.cli.stdout import StdoutConsole

    table = Table(box=None, pad_edge=False)
    for name in ("device", "runs", "from", "what it is"):
        table.add_column(name, overflow="fold")
    for profile in known.values():
        origin = "your own" if profile.name in own else "built in"
        table.add_row(profile.name, escape(how_it_runs(profile)), origin, escape(profile.title))
    StdoutConsole().print(table)


def _described(profile: Profile, *, own: bool) -> dict[str, Any]:
    from devices.registry import how_it_runs

    facts = {"own": own, "emulated": profile.emulated, "runs": how_it_runs(profile)}
    return {**asdict(profile), **facts}


UNSETTABLE = {
    "port": "port",
    "threads": "threads",
    "budget": "budget_s",
    "cooling": "cooling_c",
    "energy-sensor": "energy_sensor",
    "remote-root": "remote_root",
    "like": "like",
}
"""Option of `add` that a board does without -> its key in the user's file."""


@devices.command("add")
@click.argument("name")
@click.option(
    "--host",
    required=True,
    metavar="USER@BOARD",
    help="SSH destination, or a name of ~/.ssh/config.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="SSH port, if not your ssh's.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Intra-op threads the board has.")
@click.option(
    "--budget", "budget_s", type=DURATION, help="Time an evaluation may take there: 90s, 10m, 1h."
)
@click.option(
    "--cooling", "cooling_c", type=float, help="Latency starts below this temperature (Celsius)."
)
@click.option("--energy-sensor", metavar="PATH", help="A file there, in microwatts or -joules.")
@click.option("--remote-root", metavar="FOLDER", help="The harness's folder there.")
@click.option("--like", metavar="DEVICE", help="The built-in device it resembles most.")
@click.option(
    "--unset",
    "unset",
    multiple=True,
    type=click.Choice(list(UNSETTABLE)),
    metavar="OPTION",
    help=f"Take an option back that was given before: {', '.join(UNSETTABLE)}; may be repeated.",
)
@json_option
def add(
    name: str, like: str | None, unset: tuple[str, ...], as_json: bool, **settings: Any
) -> None:
    """Add a board of your own, or put one in the place of a built-in device.

    Adding one of your own again changes what is given, takes back what --unset names, and keeps
    the rest.

    \b
    Examples:
      harness devices add rpi4 --host pi@raspberrypi.local
      harness devices add porch --host pi@192.168.1.7 --port 2222 --like rpi5 --budget 10m
      harness devices add porch --host pi@porch --unset port --unset budget
    """
    from devices.profiles import add_profile, own_settings, user_file
    from harness.records import UsageError

    given = {"like": like, **settings}
    for option in unset:
        if given[UNSETTABLE[option]] is not None:
            raise UsageError(f"--{option} and --unset {option} exclude each other: give one")
    path = user_file()
    taken = {UNSETTABLE[option] for option in unset}
    profile, replaced = add_profile(path, name, unset=taken, **given)
    click.echo(f"{'changed' if replaced else 'added'} {name} in {path}", err=True)
    now = ", ".join(f"{key} {value}" for key, value in own_settings(path)[name].items())
    click.echo(f"now set: {now}", err=True)
    click.echo(f"next: harness devices bootstrap {name}", err=True)
    if as_json:
        click.echo(json.dumps(_described(profile, own=True), indent=2))


@devices.command("remove")
@click.argument("name")
def remove(name: str) -> None:
    """Forget a board of your own; on the board itself nothing changes.

    \b
    Examples:
      harness devices remove porch
    """
    from devices.profiles import remove_profile, user_file

    path = user_file()
    remove_profile(path, name)
    click.echo(f"removed {name} from {path}", err=True)


@devices.command("bootstrap")
@click.argument("name")
@json_option
def bootstrap(name: str, as_json: bool) -> None:
    """Bring a device to where it runs models, and prove it; again does no harm.

    A board gets onnxruntime pushed to it and needs no internet. An emulated one is set up on this
    machine: about 180 MB in your cache folder, under a minute.

    \b
    Examples:
      harness devices bootstrap rpi4
    """
    from devices.registry import device_named, profile_named

    profile = profile_named(name)
    device = device_named(name)
    if profile.host is not None:
        from devices.bootstrap import bootstrap as bootstrap_board

        bootstrap_board(profile, progress=_say)
    elif profile.emulated:
        from devices.emulated import set_up_emulator

        emulator = set_up_emulator(profile, on_progress=_say)
        _say(f"{name} is set up in {emulator.folder}")
    with device.open() as session:
        _print_machine(session.machine, as_json=as_json)


@devices.command("probe")
@click.argument("name")
@json_option
def probe(name: str, as_json: bool) -> None:
    """Start the runner on a device and print what it says of itself.

    On a fresh board it first installs the runtime, as bootstrap does; an emulated one is set up.

    \b
    Examples:
      harness devices probe local
      harness devices probe rpi4 --json
    """
    from devices.registry import device_named

    with device_named(name).open() as session:
        _print_machine(session.machine, as_json=as_json)


@devices.command("count")
@click.argument("name")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def count(name: str, models: tuple[Path, ...], as_json: bool) -> None:
    """Count the ARM instructions of one inference on an emulated device. Not a time.

    Takes a C compiler, and QEMU 6 to 8 (Debian 12's is downloaded where there is none).

    \b
    Examples:
      harness devices count rpi4 cache/full.onnx cache/q4.onnx
    """
    from devices.emulated import EmulatedDevice
    from devices.registry import device_named
    from harness.records import UsageError

    device = device_named(name)
    if not isinstance(device, EmulatedDevice):
        raise UsageError(f"{name} is not emulated: instructions are counted by an emulator")
    counts = {str(model): device.instructions(model) for model in models}
    if as_json:
        rows = [{"model": model, "instructions_per_image": n} for model, n in counts.items()]
        click.echo(json.dumps(rows, indent=2))
        return
    for model, instructions in counts.items():
        click.echo(f"{model}: {instructions:,} instructions an image")


def _print_machine(machine: Machine, *, as_json: bool) -> None:
    facts = asdict(machine)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for key, value in (facts | facts.pop("extra")).items():
        if value is not None and key != "extra":
            click.echo(f"{key}: {value}")


def _say(line: str) -> None:
    click.echo(line, err=True)
