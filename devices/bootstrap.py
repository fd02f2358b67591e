"""From a bare board with python3 to one that runs models: nothing there needs root or internet.

Enters: a connected board. Leaves: `environment.json` in its folder, written when `import
onnxruntime` was seen to work there in a process of its own; and the environment it tells of. A
board whose own python3 has onnxruntime is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devices.board import SPARE_BYTES, Board, board_of
from devices.connection import Finished, Limits
from devices.plain import plain
from devices.profiles import Profile
from devices.wheels import Target, Wheel, wanted_onnxruntime, wheels_for
from harness.records import DeviceUnreachable, HarnessError

MACHINES = ("aarch64", "x86_64")
OLDEST_PYTHON = (3, 9)
BUILD_S = 900.0
"""Unpacking a hundred megabytes on a slow memory card."""
MAX_VERSIONS = 4
"""How many onnxruntimes are tried on a board before it is given up."""
PROGRAM = Path(__file__).with_name("on_board.py")
MARKER = "environment.json"
SMOKE = (
    "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'\n"
    "import json, numpy, onnxruntime\n"
    "print(json.dumps([onnxruntime.__version__, numpy.__version__]))"
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """What runs models on a board."""

    kind: str
    """system: the board's own python3; venv; or folder: packages on PYTHONPATH."""
    folder: str | None
    """Of the environment, in the harness's folder there."""
    onnxruntime: str
    numpy: str
    wanted: str | None = None
    """The onnxruntime this machine had when it was set up: an older one may be all that runs."""

    def python(self, root: str) -> list[str]:
        """The command that runs Python there; `root` is the harness's folder."""
        return _python(self.kind, f"{root}/{self.folder}")


def bootstrap(profile: Profile, *, progress: Progress, limits: Limits | None = None) -> Environment:
    """Set up the board of `profile`, or see that it is set up.

    Raises:
        UsageError: the profile has no host.
        DeviceUnreachable: the board cannot be reached, or cannot run onnxruntime at all.
        HarnessError: it could not be set up; the message says why. Nothing half-done stays.
    """
    board = board_of(profile, limits=limits)
    board.connect()
    try:
        there = read_environment(board)
        if there is not None and _is_current(there):
            tested = _smoke(board, there.python(board.root))
            if tested.status == 0:
                progress(f"{profile.host} is set up: onnxruntime {there.onnxruntime}")
                return there
        return bootstrap_board(board, progress=progress)
    finally:
        board.close()


def bootstrap_board(board: Board, *, progress: Progress) -> Environment:
    """Set a connected board up, whatever it has. Raises as `bootstrap` does."""
    facts = _facts(board)
    target = _target(board, facts)
    own = _smoke(board, _python("system", ""))
    versions = _versions(own)
    if versions is not None:
        environment = Environment("system", None, *versions, wanted=wanted_onnxruntime())
        progress(f"{board.destination}: its own python3 has onnxruntime {versions[0]}")
        _accept(board, environment, part=None)
        return environment
    below: str | None = None
    for _version in range(MAX_VERSIONS):
        wheels = wheels_for(target, below=below, progress=progress)
        result = _try(board, wheels, free_bytes=int(facts["free_bytes"]), progress=progress)
        if isinstance(result, Environment):
            progress(f"{board.destination} is set up: onnxruntime {result.onnxruntime}")
            return result
        below = wheels[0].version
        progress(f"onnxruntime {below} dies there ({result}): trying an older one")
    raise HarnessError(
        f"{board.destination}: {MAX_VERSIONS} versions of onnxruntime down to {below} died on"
        " import: its processor may be too old for the wheels there are"
    )


def read_environment(board: Board) -> Environment | None:
    """What the board was set up with; None if it was not, or says nonsense."""
    content = board.read(board.path(MARKER))
    try:
        facts = json.loads(content or b"null")
        environment = Environment(**facts)
    except (TypeError, ValueError):
        return None
    words = (environment.onnxruntime, environment.numpy, environment.wanted or "")
    if not all(re.fullmatch(r"[\w.+-]{0,64}", str(word)) for word in words):
        return None
    kind, folder = environment.kind, environment.folder
    plain = folder is None or re.fullmatch(r"environments/[0-9a-f]{16}", str(folder))
    fits = kind == "system" if folder is None else kind in ("venv", "folder")
    return environment if plain and fits else None


def _is_current(environment: Environment) -> bool:
    wanted = wanted_onnxruntime()
    known = (None, environment.onnxruntime, environment.wanted)
    return environment.kind == "system" or wanted in known


def _try(
    board: Board, wheels: list[Wheel], *, free_bytes: int, progress: Progress
) -> Environment | str:
    """Build an environment and see it work; else what killed it."""
    name = "".join(sorted(wheel.sha256 for wheel in wheels))
    final = f"environments/{_short_hash(name)}"
    part = board.path("environments", f".{_short_hash(name)}.{secrets.token_hex(4)}.part")
    _check_room(board, wheels, free_bytes=free_bytes)
    stored = []
    for wheel in wheels:
        progress(f"sending {wheel.path.name} ({wheel.path.stat().st_size / 1e6:.0f} MB)")
        stored.append({"path": board.put(wheel.path, sha256=wheel.sha256), "sha256": wheel.sha256})
    progress("unpacking it there")
    try:
        for kind in ("venv", "folder"):
            built = _on_board(
                board, {"op": "build", "folder": part, "venv": kind == "venv", "wheels": stored}
            )
            python = _python(kind, part)
            if kind == "venv":
                # Without the venv module, or where its python cannot start: the plain folder.
                if not built["ok"] or board.run([*python, "-c", "pass"]).status != 0:
                    continue
            elif not built["ok"]:
                for wheel in wheels:  # one of them may be what is wrong: they are sent again
                    board.discard(wheel.sha256)
                raise HarnessError(f"{board.destination}: cannot unpack wheels: {built['error']}")
            tested = _smoke(board, python)
            versions = _versions(tested)
            if versions is not None:
                environment = Environment(kind, final, *versions, wanted=wanted_onnxruntime())
                _accept(board, environment, part=part)
                return environment
            if tested.killed_by is not None:
                return tested.killed_by
            raise HarnessError(
                f"{board.destination}: onnxruntime {wheels[0].version} does not run there:"
                f" {tested.last_words}"
            )
    finally:
        with suppress(HarnessError):  # what went wrong before says more; the next set-up sweeps
            _on_board(board, {"op": "discard", "folder": part})
    raise AssertionError("the plain folder either works or raises")


def _facts(board: Board) -> dict[str, Any]:
    found = _on_board(board, {"op": "facts", "root": board.root})
    if not found["ok"]:
        raise HarnessError(f"{board.destination}: cannot look at it: {found['error']}")
    return found


def _target(board: Board, facts: dict[str, Any]) -> Target:
    """What wheels must fit.

    Raises:
        DeviceUnreachable: no onnxruntime can run there.
    """
    where = board.destination
    try:
        bits, machine = int(facts["pointer_bits"]), str(facts["machine"])
        python = (int(facts["python"][0]), int(facts["python"][1]))
        libc = re.fullmatch(r"glibc (\d+)\.(\d+)", str(facts["libc"]))
        int(facts["free_bytes"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise HarnessError(f"{where}: its python3 says nonsense of itself: {facts}") from None
    if bits != 64:  # `uname -m` says aarch64 there, too
        raise DeviceUnreachable(
            f"{where} runs a {bits}-bit system ({machine}), for which there is no onnxruntime:"
            " install the 64-bit Raspberry Pi OS or Debian arm64"
        )
    if machine not in MACHINES:
        raise DeviceUnreachable(
            f"{where} is a {machine}: onnxruntime has wheels for {' and '.join(MACHINES)}"
        )
    if python < OLDEST_PYTHON or facts.get("implementation") != "CPython":
        raise DeviceUnreachable(
            f"{where} has {facts.get('implementation')} {python[0]}.{python[1]}: CPython"
            f" {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer is needed"
        )
    if libc is None:
        raise DeviceUnreachable(
            f"{where} does not use glibc: onnxruntime has no wheels for its C library"
        )
    return Target(machine, python, (int(libc[1]), int(libc[2])))


def _check_room(board: Board, wheels: list[Wheel], *, free_bytes: int) -> None:
    needed = sum(wheel.path.stat().st_size + wheel.unpacked_bytes for wheel in wheels)
    if free_bytes < needed + SPARE_BYTES:
        raise HarnessError(
            f"{board.destination}: its disk is too full: setting it up takes {needed / 1e6:.0f} MB,"
            f" {free_bytes / 1e6:.0f} MB are free in {board.root}"
        )


def _accept(board: Board, environment: Environment, *, part: str | None) -> None:
    final = None if environment.folder is None else board.path(environment.folder)
    request = {"op": "accept", "root": board.root, "folder": part, "final": final}
    accepted = _on_board(board, {**request, "environment": asdict(environment)})
    if not accepted["ok"]:
        raise HarnessError(f"{board.destination}: cannot finish setting up: {accepted['error']}")


def _smoke(board: Board, python: list[str]) -> Finished:
    """Import onnxruntime in a process of its own: on the wrong board it is killed."""
    return board.run([*python, "-c", SMOKE], timeout_s=2 * board.link.limits.command_s)


def _versions(tested: Finished) -> tuple[str, str] | None:
    """(onnxruntime, numpy) if the smoke test passed."""
    if tested.status != 0:
        return None
    try:
        runtime, numpy = json.loads(tested.stdout.strip().splitlines()[-1])
    except (ValueError, TypeError, IndexError):
        return None
    return str(runtime), str(numpy)


def _python(kind: str, folder: str) -> list[str]:
    match kind:
        case "venv":
            return [f"{folder}/bin/python", "-I"]
        case "folder":
            return ["env", f"PYTHONPATH={folder}/site", "python3", "-s"]
    return ["python3"]


def _on_board(board: Board, request: dict[str, Any]) -> dict[str, Any]:
    """Run one operation of on_board.py there."""
    done = board.run(
        ["python3", "-", json.dumps(request)], stdin=PROGRAM.read_bytes(), timeout_s=BUILD_S
    )
    if done.status == 127:
        raise DeviceUnreachable(
            f"{board.destination} has no python3: sudo apt-get install python3 (there)"
        )
    try:
        reply = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        reply = None
    if not isinstance(reply, dict) or "ok" not in reply:
        raise HarnessError(f"{board.destination}: its python3 does not work: {done.last_words}")
    return {**reply, "error": plain(reply.get("error", "it did not say why"))}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
