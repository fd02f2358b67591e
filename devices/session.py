"""A conversation with a runner: what every device shares, whatever carries the lines.

Enters: models, images, perturbations on the workstation. Leaves: predictions and raw timings from
the device. A kind of device brings a `Transport`; callers hold a `Device`.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from devices import requests
from devices.conversation import REPLY_TIMEOUT_S, Conversation
from devices.model_file import MAX_MODEL_BYTES, check_model_file
from devices.perturbation import Images, checked_delta, checked_images
from devices.requests import Array, Load, LoadedModel, Sensors
from devices.transport import Transport
from harness.records import (
    LatencyProcess,
    MeasurementInvalid,
    UsageError,
)

T = TypeVar("T")

DEFAULT_BATCH_SIZE = 128
CHUNK_S = 0.5
"""Requests grow until one takes this long: few round trips, and still a lively progress bar."""
COOLING_LIMIT_S = 300.0
"""How long the runner waits for a board to cool."""


class Device(Protocol):
    """Somewhere models run."""

    @property
    def name(self) -> str:
        """As in `--device NAME`."""
        ...

    @property
    def emulated(self) -> bool:
        """An emulator computes the right predictions and meaningless times."""
        ...

    @property
    def default_budget_s(self) -> float | None:
        """How long an evaluation may take unless the user says; None for as long as it takes."""
        ...

    def open(self) -> AbstractContextManager[DeviceSession]:
        """Start a fresh runner; it ends with the context."""
        ...


class DeviceSession:
    """One runner with at most one model and one set of images loaded. See `open_session`.

    A lost connection is taken up again if the session was opened so: a new runner gets the same
    model and images, verified again, and the request it was about is repeated.
    """

    def __init__(self, conversation: Conversation, *, folder: Path, sensors: Sensors) -> None:
        self._conversation = conversation
        self._folder = folder
        self._sensors = sensors
        self._files = itertools.count(1)
        self._arrays: dict[str, Array] = {}
        self._load: Load | None = None
        self._images: Array | None = None
        self._model: LoadedModel | None = None
        self._greeting = conversation.surviving(
            lambda: requests.hello(conversation), restore=lambda: None
        )
        self.machine = self._greeting.machine

    @property
    def pid(self) -> int:
        """The runner's process, on the device."""
        return self._greeting.pid

    @property
    def boot_id(self) -> str | None:
        """Another one when the device was rebooted."""
        return self._greeting.boot_id

    def load(self, model: Path, *, threads: int, max_bytes: int = MAX_MODEL_BYTES) -> LoadedModel:
        """Load an ONNX file with `threads` intra-op threads, replacing the model before.

        Raises:
            UsageError: the file breaks the convention (`check_model_file`), or onnxruntime there
                cannot load it.
            HarnessError: the file changed on the way, or the device failed.
        """
        if threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        self._load = self._model = None
        checked = check_model_file(model, max_bytes=max_bytes)
        load = Load(model, checked, threads, max_bytes)
        self._model = self._surviving(lambda: requests.load(self._conversation, load))
        self._load = load
        return self._model

    def set_images(self, images: Images) -> None:
        """Send the images, uint8 [N, C, H, W], that `predict` and `measure` use from now on.

        Raises:
            UsageError: another dtype or shape, or no image.
        """
        images = checked_images(images)
        self._images = None
        array = self._array(images)
        self._surviving(lambda: requests.keep_images(self._conversation, array))
        self._images = array

    def predict(
        self,
        delta_255: npt.NDArray[np.integer] | None,
        *,
        start: int = 0,
        stop: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        on_progress: Callable[[int], None] | None = None,
    ) -> npt.NDArray[np.int64]:
        """The class the device predicts for each of the images [start, stop): int64.

        Args:
            delta_255: added to every image before clipping, integers [C, H, W] in 1/255 units
                (`devices.perturbation`); None for clean images.
            start: first image.
            stop: one past the last; None for all that follow.
            batch_size: images per run of the model.
            on_progress: called with the number of images done, about once a second or per batch.

        Raises:
            UsageError: shapes that do not fit each other, or a range outside the images.
            MeasurementInvalid: logits that are not finite.
            DeviceUnreachable: the runner ended or fell silent, and stayed away.
        """
        shape = self._ready()
        if batch_size < 1:
            raise UsageError(f"batch size must be at least 1, got {batch_size}")
        stop = shape[0] if stop is None else stop
        if not 0 <= start < stop <= shape[0]:
            raise UsageError(f"there is no range [{start}, {stop}) in {shape[0]} images")
        delta = None
        if delta_255 is not None:
            delta = self._array(checked_delta(delta_255, image_shape=shape[1:]))
        predictions = np.empty(stop - start, dtype=np.int64)
        model, ask = self._model, self._conversation
        assert model is not None
        low, chunk = start, batch_size
        while low < stop:
            high = min(low + chunk, stop)
            began_s = time.monotonic()
            predictions[low - start : high - start] = self._surviving(
                partial(
                    requests.predict, ask, model, delta, start=low, stop=high, batch_size=batch_size
                )
            )
            if on_progress is not None:
                on_progress(high - start)
            if time.monotonic() - began_s < CHUNK_S:
                chunk *= 2  # in whole batches, so that chunks never change a batch
            low = high
        return predictions

    def measure(
        self,
        *,
        warmup_runs: int,
        warmup_seconds: float,
        min_runs: int,
        min_seconds: float,
        delta_255: npt.NDArray[np.integer] | None = None,
    ) -> LatencyProcess:
        """Batch-1 latency of the loaded model, which must not have run yet; images cycle.

        Warm-up and measurement each last until both their counts and their seconds are reached.
        With `delta_255` clean and attacked images take turns: runs 0, 2, 4, ... of the warm-up
        and of the samples are clean, the others attacked. After a lost connection it starts anew.

        Returns:
            The process; the first reading of its telemetry also has `boot_id`, another one when
            the device was rebooted since, and `alternating`.

        Raises:
            UsageError: shapes that do not fit each other, or a model that has run.
            MeasurementInvalid: the device does not cool.
        """
        shape = self._ready()
        values: dict[str, Any] = {
            "warmup_runs": warmup_runs,
            "warmup_seconds": warmup_seconds,
            "min_runs": min_runs,
            "min_seconds": min_seconds,
        }
        limit_s = self._conversation.reply_timeout_s + warmup_seconds + min_seconds
        if self._sensors.energy is not None:
            values["energy"] = self._sensors.energy
        if self._sensors.cooling_c is not None:
            values["cooling_c"] = self._sensors.cooling_c
            limit_s += COOLING_LIMIT_S
        delta = None
        if delta_255 is not None:
            delta = self._array(checked_delta(delta_255, image_shape=shape[1:]))

        def step() -> LatencyProcess:
            assert self._model is not None
            return requests.latency(
                self._conversation, self._model, delta, timeout_s=limit_s, **values
            )

        process = self._surviving(step)
        facts = {"boot_id": self.boot_id, "alternating": delta is not None}
        first = {**(process.telemetry[0] if process.telemetry else {}), **facts}
        return replace(process, telemetry=(first, *process.telemetry[1:]))

    def _surviving(self, step: Callable[[], T]) -> T:
        return self._conversation.surviving(step, restore=self._restore)

    def _restore(self) -> None:
        """Bring a new runner to where the lost one was."""
        self._greeting = requests.hello(self._conversation)
        if self._greeting.machine != self.machine:
            raise MeasurementInvalid(
                f"another machine answered after the connection was lost: {self.machine} became"
                f" {self._greeting.machine}"
            )
        if self._load is not None:
            self._model = requests.load(self._conversation, self._load)
        if self._images is not None:
            requests.keep_images(self._conversation, self._images)

    def _ready(self) -> tuple[int, ...]:
        """Shape of the images, which must be there, as must a model that takes them."""
        if self._model is None or self._images is None:
            raise UsageError("load a model and set images first")
        if self._images.shape[1:] != self._model.image_shape:
            raise UsageError(
                f"the model takes images {self._model.image_shape},"
                f" these are {self._images.shape[1:]}"
            )
        return self._images.shape

    def _array(self, array: npt.NDArray[Any]) -> Array:
        """A file of `array`, written once however often it is asked for."""
        digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
        known = self._arrays.get(digest.hexdigest())
        if known is not None:
            return known
        path = self._folder / f"{next(self._files)}.npy"
        np.save(path, array, allow_pickle=False)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self._arrays.setdefault(digest.hexdigest(), Array(path, sha256, array.shape))


@contextmanager
def open_session(
    transport: Transport,
    *,
    reply_timeout_s: float = REPLY_TIMEOUT_S,
    reconnect_s: float = 0.0,
    sensors: Sensors | None = None,
    notice: Callable[[str], None] | None = None,
    was_there: bool = False,
) -> Iterator[DeviceSession]:
    """Start a runner over `transport`; end it with the context, at once if the context failed.

    Args:
        transport: carries lines and files.
        reply_timeout_s: how long the runner may take for one answer.
        reconnect_s: how long a lost connection is tried again; 0 gives up at once.
        sensors: what to heed while latency is measured.
        notice: told in one line when a connection is lost, and when it is back.
        was_there: whether the device has answered before: it may be starting anew, and a first
            connection that fails is tried again like a lost one.

    Raises:
        DeviceUnreachable: the runner does not start or does not answer.
    """
    conversation = Conversation(
        transport, reply_timeout_s=reply_timeout_s, reconnect_s=reconnect_s, notice=notice
    )
    with tempfile.TemporaryDirectory(prefix="harness-device-") as folder:
        try:
            conversation.start(patient=was_there)
            yield DeviceSession(conversation, folder=Path(folder), sensors=sensors or Sensors())
        except BaseException:  # Ctrl-C too: whatever the runner is doing, nobody waits for it
            transport.close(kill=True)
            raise
        transport.close()
