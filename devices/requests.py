"""What a runner is asked, request by request, and what its answers must hold.

Enters: a `Conversation`; models and arrays with their checksums. Leaves: records, from replies that
were checked: the device is not trusted. Each request may be repeated after a lost connection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.conversation import Conversation, Reply
from devices.model_file import ModelFile
from devices.plain import plain
from harness.records import HarnessError, LatencyProcess, Machine, UsageError

PROTOCOL = 1
"""The version of runner.py's protocol that this module speaks."""
HELLO_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class LoadedModel:
    """What the device says of the model it has loaded."""

    sha256: str
    classes: int
    image_shape: tuple[int, int, int]
    load_ns: int
    rss_load_bytes: int | None
    """Resident memory of the runner right after loading; None where the system does not say."""


@dataclass(frozen=True)
class Sensors:
    """What to heed on a device while its latency is measured."""

    energy: str | None = None
    """A file there with microjoules or microwatts (`runner.read_energy`)."""
    cooling_c: float | None = None
    """The measurement starts below this temperature."""


@dataclass(frozen=True)
class Load:
    """A model as it was loaded, to load it again."""

    model: Path
    checked: ModelFile
    threads: int
    max_bytes: int


@dataclass(frozen=True)
class Array:
    """An array for the device: its file here, and its identity."""

    path: Path
    sha256: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Greeting:
    """What the device says of itself."""

    machine: Machine
    pid: int
    boot_id: str | None
    """Another one after every start of the device; None where the system has none."""


def hello(conversation: Conversation) -> Greeting:
    """Facts of the machine.

    Raises:
        HarnessError: a runner of another version.
    """
    facts = conversation.ask("hello", timeout_s=HELLO_TIMEOUT_S)
    with _checked():
        if facts["protocol"] != PROTOCOL:
            raise HarnessError(
                f"the device's runner speaks protocol {facts['protocol']}, not {PROTOCOL}:"
                " install the runner again"
            )
        machine = Machine(
            arch=plain(facts["arch"]),
            cpu=plain(facts["cpu"]),
            cores=int(facts["cores"]),
            os=plain(facts["os"]),
            python=plain(facts["python"]),
            runtime_version=plain(facts["onnxruntime"]),
            extra={
                "numpy": plain(facts["numpy"]),
                "pointer_bits": int(facts["pointer_bits"]),
                "board": None if facts["board"] is None else plain(facts["board"]),
            },
        )
        return Greeting(machine, int(facts["pid"]), facts.get("boot_id"))


def load(conversation: Conversation, what: Load) -> LoadedModel:
    """Load a model, put on the device first."""
    checked = what.checked
    try:
        reply = conversation.ask_about(
            what.model.resolve(),
            checked.sha256,
            lambda path: conversation.ask(
                "load",
                about=str(what.model),
                path=path,
                sha256=checked.sha256,
                threads=what.threads,
                max_bytes=what.max_bytes,
            ),
        )
    except UsageError as error:
        raise UsageError(f"{error}: `harness export --check {what.model}` looks into it") from None
    with _checked():
        if (reply["classes"], tuple(reply["image_shape"])) != (
            checked.classes,
            checked.image_shape,
        ):
            raise HarnessError(f"{what.model}: the device sees another model than the workstation")
        return LoadedModel(
            sha256=checked.sha256,
            classes=checked.classes,
            image_shape=checked.image_shape,
            load_ns=reply["load_ns"],
            rss_load_bytes=reply["rss_load_bytes"],
        )


def keep_images(conversation: Conversation, array: Array) -> None:
    """Have the device keep the images for what follows."""
    conversation.ask_about(
        array.path,
        array.sha256,
        lambda path: conversation.ask("images", path=path, sha256=array.sha256),
    )


def predict(
    conversation: Conversation,
    model: LoadedModel,
    delta: Array | None,
    *,
    start: int,
    stop: int,
    batch_size: int,
) -> list[int]:
    """Classes of the images [start, stop), clean or under a perturbation."""
    values = {"start": start, "stop": stop, "batch_size": batch_size}
    reply = _ask_attacked(conversation, "predict", delta, **values)
    with _checked():
        predictions: list[int] = reply["predictions"]
        if len(predictions) != stop - start:
            raise HarnessError(
                f"the device returned {len(predictions)} predictions for images {start} to {stop}"
            )
        classes = range(model.classes)
        if not all(type(p) is int and p in classes for p in predictions):
            raise HarnessError(
                f"the device returned classes of images {start} to {stop} that are not within 0 to"
                f" {classes[-1]}"
            )
        return predictions


def latency(
    conversation: Conversation,
    model: LoadedModel,
    delta: Array | None,
    *,
    timeout_s: float,
    **values: Any,
) -> LatencyProcess:
    """Time the model, which must not have run yet; `values` as in runner.py's `latency`."""
    reply = _ask_attacked(conversation, "latency", delta, timeout_s=timeout_s, **values)
    with _checked():
        return LatencyProcess(
            load_ns=model.load_ns,
            first_ns=_whole(reply["first_ns"], at_least=1),
            warmup_ns=_samples(reply["warmup_ns"], at_least=0),
            samples_ns=_samples(reply["samples_ns"], at_least=max(1, values.get("min_runs", 1))),
            telemetry=tuple(_reading(reading) for reading in reply["telemetry"]),
            rss_load_bytes=_size(reply["rss_load_bytes"]),
            rss_peak_bytes=_size(reply["rss_peak_bytes"]),
        )


def _whole(value: Any, *, at_least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{value!r} is no whole number from {at_least} on")
    return value


def _size(value: Any) -> int | None:
    return None if value is None else _whole(value, at_least=0)


def _samples(values: Any, *, at_least: int) -> tuple[int, ...]:
    """Times in nanoseconds; a run of no time at all did not happen."""
    if not isinstance(values, list) or len(values) < at_least:
        raise ValueError(f"fewer than {at_least} times")
    return tuple(_whole(value, at_least=1) for value in values)


def _reading(reading: Any) -> dict[str, Any]:
    """One reading of the board's sensors: plain values under names."""
    if not isinstance(reading, dict):
        raise TypeError("a reading is no table")
    for value in reading.values():
        simple = value is None or isinstance(value, str | bool | int | float)
        if not simple or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"a reading holds {value!r}")
    return {plain(k): plain(v) if isinstance(v, str) else v for k, v in reading.items()}


def _ask_attacked(
    conversation: Conversation,
    operation: str,
    delta: Array | None,
    *,
    timeout_s: float | None = None,
    **values: Any,
) -> Reply:
    """Ask with a perturbation, put where the device can read it, or without."""
    if delta is None:
        return conversation.ask(operation, timeout_s=timeout_s, **values)
    sha256 = delta.sha256
    return conversation.ask_about(
        delta.path,
        sha256,
        lambda path: conversation.ask(
            operation, timeout_s=timeout_s, delta=path, delta_sha256=sha256, **values
        ),
    )


@contextmanager
def _checked() -> Iterator[None]:
    """A reply that lacks what it must have is one clear error, not a traceback."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise HarnessError(
            f"the device's runner answered without what was asked ({type(error).__name__}:"
            f" {error}): install the runner again"
        ) from None
