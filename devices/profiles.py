"""Devices are data: what is known of a board, built in or the user's own, and how to reach it.

Enters: `profiles/*.toml` of this package and the user's `devices.toml`. Leaves: `Profile`s; and
the user's file, changed atomically when a device is added or removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from devices.emulator_board import BOARDS
from devices.plain import shortened
from harness.records import HarnessError, UsageError

APPLICATION = "uap-edge-harness"
LOCAL = "local"
ANY_BOARD = "arm64"
"""What a device of the user's own is like, unless it says."""
ARCHITECTURE = "aarch64"
"""Of every built-in board, as `platform.machine()` calls it."""
CACHE_HINT = "XDG_CACHE_HOME chooses another cache folder"
BUILT_IN = Path(__file__).with_name("profiles")
LIKE = "like"

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:%-]{0,252}")
"""`user@host`, an address, or an alias of the user's ssh configuration; never an option."""
HOST_AND_PORT = re.compile(r"[^:]+:(?P<port>\d+)")
"""One colon, so no IPv6 address."""


@dataclass(frozen=True)
class Profile:
    """One device, and what to respect when it measures."""

    name: str
    title: str
    host: str | None = None
    """SSH destination: `user@host`, or an alias of the user's ssh configuration."""
    port: int | None = None
    """None: what the ssh configuration says, or 22."""
    threads: int = 1
    """Intra-op threads the board has cores for."""
    budget_s: float | None = None
    """Default time budget of an evaluation; None is unlimited."""
    cooling_c: float | None = None
    """Latency starts only below this temperature."""
    emulate: str | None = None
    """The core QEMU emulates when there is no host; None: this board cannot be emulated."""
    energy_sensor: str | None = None
    """A file on the device with microwatts or microjoules."""
    remote_root: str = f".cache/{APPLICATION}"
    """The harness's folder on the board, from the home folder."""

    def __post_init__(self) -> None:
        for field, problem in _problems(self):
            raise UsageError(f"device {shortened(self.name)!r}: {field} {problem}")

    @property
    def emulated(self) -> bool:
        """Whether it runs under an emulator on this machine."""
        return self.host is None and self.emulate is not None


def _problems(profile: Profile) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of everything that is."""
    p = profile
    if not isinstance(p.name, str) or not NAME.fullmatch(p.name):
        yield "name", "must be lower-case letters, digits, - and _, at most 40"
    if not _is_text(p.title):
        yield "title", f"must be one line of text, got {p.title!r}"
    if p.host is not None and not (isinstance(p.host, str) and HOST.fullmatch(p.host)):
        yield (
            "host",
            f"must be user@host or a name of the ssh configuration, got {shortened(p.host)!r}",
        )
    elif p.host is not None and (with_port := HOST_AND_PORT.fullmatch(p.host)):
        yield "host", f"must be without a port, got {p.host!r}: use --port {with_port['port']}"
    if p.port is not None and not (_is_whole(p.port) and 1 <= p.port <= 65535):
        yield "port", f"must be a whole number from 1 to 65535, got {p.port!r}"
    if not (_is_whole(p.threads) and 1 <= p.threads <= 1024):
        yield "threads", f"must be a whole number from 1 to 1024, got {p.threads!r}"
    if p.budget_s is not None and not (_is_number(p.budget_s) and 0 < p.budget_s < 1e9):
        yield "budget_s", f"must be a positive number of seconds, got {p.budget_s!r}"
    if p.cooling_c is not None and not (_is_number(p.cooling_c) and 0 < p.cooling_c < 150):
        yield "cooling_c", f"must be a temperature in Celsius, got {p.cooling_c!r}"
    if p.emulate is not None and (not isinstance(p.emulate, str) or p.emulate not in BOARDS):
        yield "emulate", f"must be one of {', '.join(BOARDS)}, got {p.emulate!r}"
    sensor = p.energy_sensor
    if sensor is not None and not (_is_text(sensor) and PurePosixPath(sensor).is_absolute()):
        yield "energy_sensor", f"must be an absolute path on the device, got {sensor!r}"
    if not _is_text(p.remote_root) or not PurePosixPath(p.remote_root).name:
        yield "remote_root", f"must be a folder on the device, got {p.remote_root!r}"
    elif ".." in PurePosixPath(p.remote_root).parts or p.remote_root.startswith(("~", "-")):
        yield "remote_root", f"must be a plain path from the home folder, got {p.remote_root!r}"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and bool(value.strip())


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)


Tables = dict[str, dict[str, Any]]
"""Of the user's file: device -> settings."""
SETTABLE = tuple(field.name for field in fields(Profile) if field.name != "name")


# --- reading -----------------------------------------------------------------------------------


def user_file() -> Path:
    """Where the user's own devices are kept: in the user's configuration folder."""
    return user_folder("XDG_CONFIG_HOME", ".config") / "devices.toml"


def user_folder(variable: str, default: str) -> Path:
    """This program's folder in one of the user's base directories."""
    base = os.environ.get(variable, "")
    if not Path(base).is_absolute():  # to be ignored, says the standard
        try:
            base = str(Path.home() / default)
        except RuntimeError:
            raise HarnessError(f"no home folder: set HOME or {variable}") from None
    return Path(base) / APPLICATION


def profiles(user_file: Path) -> dict[str, Profile]:
    """Every device by name: the built-in ones, overlaid with the user's own.

    Raises:
        UsageError: a file that cannot be read, or has an unknown key or a value out of range.
    """
    known = built_in()
    for name, settings in own_settings(user_file).items():
        try:
            known[name] = _overlaid(name, settings)
        except UsageError as error:
            raise UsageError(f"{user_file}: {error}") from None
    return known


def built_in() -> dict[str, Profile]:
    """The devices that come with the harness; this machine first."""
    found = {}
    for path in sorted(BUILT_IN.glob("*.toml"), key=lambda path: (path.stem != LOCAL, path.stem)):
        settings = _parsed(path)
        _refuse_unknown(settings, SETTABLE, where=str(path))
        found[path.stem] = Profile(name=path.stem, **settings)
    return found


def stands_for(user_file: Path, name: str) -> Profile | None:
    """The built-in board that the device is or was said to be like; None where nobody said."""
    like = own_settings(user_file).get(name, {}).get(LIKE, name)
    return built_in().get(like) if like != LOCAL else None


def own_settings(user_file: Path) -> dict[str, dict[str, Any]]:
    """The tables of the user's file, as written; empty when there is none."""
    tables = _parsed(user_file, missing_ok=True)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{user_file}: {name!r} must be a table, as in [{name}]")
    return tables


def _overlaid(name: str, settings: Mapping[str, Any]) -> Profile:
    """The device `name`: a built-in one, with `settings` in place of its own."""
    if name == LOCAL:
        raise UsageError(f"{LOCAL} is this machine: give the board another name")
    bases = built_in()
    like = settings.get(LIKE, name if name in bases else ANY_BOARD)
    if not isinstance(like, str) or like not in bases or like == LOCAL:
        boards = ", ".join(base for base in bases if base != LOCAL)
        raise UsageError(
            f"device {shortened(name)!r} is like {shortened(like)!r}: choose from {boards}"
        )
    _refuse_unknown(settings, (*SETTABLE, LIKE), where=f"device {shortened(name)!r}")
    base = bases[like]
    if name != like:
        base = replace(base, name=name, title=f"{name}, like {like}")
    return replace(base, **{key: value for key, value in settings.items() if key != LIKE})


def _parsed(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise UsageError(f"{path} is missing") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # TOML and UTF-8 errors alike
        raise UsageError(f"{path}: {' '.join(str(error).split())}: correct or remove it") from None


def _refuse_unknown(settings: Mapping[str, Any], known: tuple[str, ...], *, where: str) -> None:
    for key in settings:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}: choose from {', '.join(known)}")


# --- writing -----------------------------------------------------------------------------------


def add_profile(
    user_file: Path,
    name: str,
    *,
    like: str | None = None,
    unset: Collection[str] = (),
    **settings: Any,
) -> tuple[Profile, bool]:
    """Write a device into the user's file; of the user's own one of that name, the rest stays.

    Args:
        user_file: the file; made when missing.
        name: of the device; a built-in one's name puts the user's board in its place.
        like: the built-in device whose settings apply where `settings` is silent.
        unset: fields to take out of the user's file, set there or not; LIKE is one.
        **settings: fields of `Profile`; None is left as it is.

    Returns:
        The device as it is from now on, and whether it replaced one of the user's own.

    Raises:
        UsageError: a value out of range, or a file that cannot be read or written.
    """
    given = {key: v for key, v in {LIKE: like, **settings}.items() if v is not None}
    _overlaid(name, given)  # what is wrong with the request, before any file is touched

    def table(own: Tables) -> dict[str, Any]:
        kept = {key: value for key, value in own.get(name, {}).items() if key not in unset}
        return {**kept, **given}

    def with_it(text: str) -> str:
        settings = table(tomllib.loads(text))
        try:
            _overlaid(name, settings)
        except UsageError as error:  # of what the user wrote there before
            raise UsageError(
                f"{user_file}: {error}: correct it, or harness devices remove {name} first"
            ) from None
        lines = [f"{key} = {_toml(value)}" for key, value in settings.items()]
        section = "\n".join([f"[{name}]", *lines, ""])
        rest = _without(text, name)
        gap = "\n" if rest.strip() and not rest.endswith("\n\n") else ""
        return f"{rest}{gap}{section}"

    def expected(own: Tables) -> Tables:
        return {**own, name: table(own)}

    before = _rewrite(user_file, with_it, expected)
    return _overlaid(name, table(before)), name in before


def remove_profile(user_file: Path, name: str) -> None:
    """Take a device of the user's own out of the user's file.

    Raises:
        UsageError: it is built in, or there is none of that name; or the file cannot be changed.
    """
    own = own_settings(user_file)
    if name not in own:
        if name in built_in():
            raise UsageError(f"{name} is built in, and nothing of your own is set for it")
        mine = ", ".join(own) or "none"
        raise UsageError(f"no device of your own is called {shortened(name)!r}; there are: {mine}")
    _rewrite(
        user_file,
        lambda text: _without(text, name),
        lambda tables: {key: table for key, table in tables.items() if key != name},
    )


def _toml(value: str | float) -> str:
    """A value as TOML writes it; the texts of a profile are printable."""
    if not isinstance(value, str):
        return repr(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _without(text: str, name: str) -> str:
    """The text less the table `name`; comments elsewhere stay."""
    header = re.compile(r"^[ \t]*\[", re.MULTILINE)
    start = re.search(rf"^[ \t]*\[[ \t]*{re.escape(name)}[ \t]*\].*$", text, re.MULTILINE)
    if start is None:
        return text if not text or text.endswith("\n") else text + "\n"
    following = header.search(text, start.end())
    return text[: start.start()] + (text[following.start() :] if following else "")


def _rewrite(
    path: Path, change: Callable[[str], str], expected: Callable[[Tables], Tables]
) -> Tables:
    """Change the file at once or not at all, and only to what is meant; return what was in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            before = own_settings(path)
            text = change(path.read_text(encoding="utf-8") if path.exists() else "")
            try:
                meant = tomllib.loads(text) == expected(before)
            except ValueError:
                meant = False
            if not meant:
                raise UsageError(f"{path} is written in a way only you can change: edit it by hand")
            _replace_text(path, text)
            return before
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace_text(path: Path, text: str) -> None:
    target = path.resolve()  # a link into a folder of dotfiles stays one
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
