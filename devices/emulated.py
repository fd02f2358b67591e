"""A board emulated on this machine: the real aarch64 onnxruntime under QEMU (FACTS I).

Enters: a profile without a host. Leaves: sessions whose predictions are a board's, bit for bit,
and whose times mean nothing. There is no falling back: what cannot be emulated is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from devices.conversation import REPLY_TIMEOUT_S
from devices.emulator_archive import SetupFailed
from devices.emulator_parts import ARCHITECTURE
from devices.emulator_setup import RECIPE, Emulator, find_emulator, set_up
from devices.instructions import instruction_counter
from devices.local import RUNNER
from devices.process import ProcessTransport
from devices.profiles import Profile, user_folder
from devices.session import DeviceSession, open_session
from harness.records import DeviceUnreachable, Machine, UsageError

DEFAULT_BUDGET_S = 300.0
"""An emulated image takes seconds: five minutes are a sample with an interval, not a night."""


class EmulatedDevice:
    """The board of `profile`, emulated; set up at its first use."""

    def __init__(
        self,
        profile: Profile,
        *,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
        on_progress: Callable[[str], None] | None = None,
        home: Path | None = None,
    ) -> None:
        """Prepare it; nothing is set up or started yet.

        Args:
            profile: with a core to emulate.
            reply_timeout_s: how long the runner may take for one answer.
            on_progress: called with lines for people; None: standard error.
            home: where the runner keeps its journal; None: in the user's cache folder.
        """
        self.profile = profile
        self.name = profile.name
        self.emulated = True
        self.default_budget_s = DEFAULT_BUDGET_S if profile.budget_s is None else profile.budget_s
        self._reply_timeout_s = reply_timeout_s
        self._on_progress = on_progress or say_on_stderr
        self._home = home
        self._announced = False

    def open(self) -> AbstractContextManager[DeviceSession]:
        """Start a fresh runner under the emulator; it ends with the context.

        Raises:
            DeviceUnreachable: the emulator cannot be set up, or the runner does not answer.
        """
        return self._open()

    def instructions(self, model: Path) -> int:
        """ARM instructions of one inference of an ONNX file, batch 1, one thread. Not a time.

        Raises:
            UsageError: not a model that can be run.
            HarnessError: nothing here can count, or the emulator failed.
        """
        python = emulated_python(self.profile, on_progress=self._on_progress)
        folder = emulator_folder(self.profile).parent / "counter"
        return instruction_counter(folder, progress=self._on_progress).count(model, python=python)

    @contextmanager
    def _open(self) -> Iterator[DeviceSession]:
        command = emulated_python(self.profile, on_progress=self._on_progress)
        # -I: nothing of this machine's Python; -B: what is set up stays as it was proven.
        # The journal: an emulated image takes seconds, and none is evaluated twice.
        home = self._home or user_folder("XDG_CACHE_HOME", ".cache") / "emulated"
        transport = ProcessTransport([*command, "-I", "-B", str(RUNNER), "--home", str(home)])
        with ExitStack() as stack:
            try:
                session = stack.enter_context(
                    open_session(transport, reply_timeout_s=self._reply_timeout_s)
                )
            except DeviceUnreachable as error:
                raise DeviceUnreachable(
                    f"the emulated {self.name} does not start: {error}; harness devices bootstrap"
                    f" {self.name} proves it, or builds it anew"
                ) from None
            if session.machine.arch != ARCHITECTURE:
                raise DeviceUnreachable(
                    f"the emulated {self.name} calls itself {session.machine.arch}, not"
                    f" {ARCHITECTURE}: nothing it predicts would be of a board"
                )
            self._announce(session.machine)
            yield session

    def _announce(self, machine: Machine) -> None:
        """Say once what the numbers mean, and what differs from this machine's."""
        import onnxruntime

        if self._announced:
            return
        self._announced = True
        here, there = onnxruntime.__version__, machine.runtime_version
        other = "" if here == there else f"; it runs onnxruntime {there}, this machine {here}"
        self._on_progress(
            f"{self.name} is emulated ({self.profile.emulate}, QEMU):"
            f" predictions are real ARM, latency is null{other}"
        )


def emulated_python(
    profile: Profile, *, on_progress: Callable[[str], None] | None = None
) -> list[str]:
    """The command that runs the emulated board's python3, which is set up first if it is not yet.

    The guest sees this machine's files, and onnxruntime and numpy among its packages.

    Raises:
        DeviceUnreachable: it cannot be set up here; the message says why, and what else to do.
    """
    there = find_emulator(emulator_folder(profile))
    emulator = there or set_up_emulator(profile, on_progress=on_progress or say_on_stderr)
    return emulator.command


def set_up_emulator(profile: Profile, *, on_progress: Callable[[str], None]) -> Emulator:
    """Set the emulator up, or prove that the one there works and build it anew if it does not.

    Raises:
        DeviceUnreachable: it cannot be set up here; the message says why, and what else to do.
    """
    folder = emulator_folder(profile)
    assert profile.emulate is not None
    if find_emulator(folder) is None:
        on_progress(
            f"setting up the emulated {profile.name} in {folder}"
            " (once; about 180 MB, under a minute)"
        )
    try:
        if not sys.platform.startswith("linux"):
            raise SetupFailed(f"it needs Linux, this is {sys.platform}")
        return set_up(folder, cpu=profile.emulate, runner=RUNNER, on_progress=on_progress)
    except SetupFailed as error:
        raise DeviceUnreachable(
            f"the emulated {profile.name} cannot be set up: {error}; with a board of your own:"
            f" harness devices add {profile.name} --host USER@BOARD"
        ) from None


def emulator_folder(profile: Profile) -> Path:
    """Where the emulator of a core is kept, for this user and this version of onnxruntime.

    Raises:
        UsageError: the profile names no core to emulate.
    """
    import onnxruntime

    if profile.emulate is None:
        raise UsageError(
            f"{profile.name} cannot be emulated: harness devices add {profile.name}"
            " --host USER@BOARD"
        )
    name = f"{profile.emulate}-onnxruntime-{onnxruntime.__version__}-r{RECIPE}"
    return user_folder("XDG_CACHE_HOME", ".cache") / "emulated" / name


def is_set_up(profile: Profile) -> bool:
    """Whether the emulator is there already."""
    return find_emulator(emulator_folder(profile)) is not None


def say_on_stderr(line: str) -> None:
    """Progress for a person who called no command line of ours."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
