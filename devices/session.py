"""A conversation with a runner: what every device shares, whatever carries the lines.

Enters: models, images, perturbations on the workstation. Leaves: predictions and raw timings from
the device. A kind of device brings a `Transport`; callers hold a `Device`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from devices.model_file import MAX_MODEL_BYTES, check_model_file
from devices.perturbation import Images, checked_delta, checked_images
from devices.transport import Transport
from harness.records import (
    DeviceUnreachable,
    HarnessError,
    LatencyProcess,
    Machine,
    MeasurementInvalid,
    UsageError,
)

PROTOCOL = 1
"""The version of runner.py's protocol that this module speaks."""
HELLO_TIMEOUT_S = 120.0
REPLY_TIMEOUT_S = 600.0
"""One batch, or one model to load, on the slowest device there is (an emulated one)."""
DEFAULT_BATCH_SIZE = 128
CHUNK_S = 0.5
"""Requests grow until one takes this long: few round trips, and still a lively progress bar."""

ERRORS: dict[str, type[HarnessError]] = {"usage": UsageError, "output": MeasurementInvalid}
"""What a runner's refusal means to the user; any other kind is a plain failure."""


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

    def open(self) -> AbstractContextManager[DeviceSession]:
        """Start a fresh runner; it ends with the context."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """What the device says of the model it has loaded."""

    sha256: str
    classes: int
    image_shape: tuple[int, int, int]
    load_ns: int
    rss_load_bytes: int | None
    """Resident memory of the runner right after loading; None where the system does not say."""


class DeviceSession:
    """One runner with at most one model and one set of images loaded. See `open_session`."""

    def __init__(self, transport: Transport, *, folder: Path, reply_timeout_s: float) -> None:
        self._transport = transport
        self._folder = folder
        self._reply_timeout_s = reply_timeout_s
        self._ids = itertools.count(1)
        self._files = itertools.count(1)
        self._model: LoadedModel | None = None
        self._images_shape: tuple[int, ...] | None = None
        facts = self._request("hello", timeout_s=HELLO_TIMEOUT_S)
        if facts["protocol"] != PROTOCOL:
            raise HarnessError(
                f"the device's runner speaks protocol {facts['protocol']}, not {PROTOCOL}:"
                " install the runner again"
            )
        self.pid: int = facts["pid"]
        self.machine = Machine(
            arch=facts["arch"],
            cpu=facts["cpu"],
            cores=facts["cores"],
            os=facts["os"],
            python=facts["python"],
            runtime_version=facts["onnxruntime"],
            extra={key: facts[key] for key in ("numpy", "pointer_bits", "board")},
        )

    def load(self, model: Path, *, threads: int, max_bytes: int = MAX_MODEL_BYTES) -> LoadedModel:
        """Load an ONNX file with `threads` intra-op threads, replacing the model before.

        Raises:
            UsageError: the file breaks the convention (`check_model_file`), or onnxruntime there
                cannot load it.
            HarnessError: the file changed on the way, or the device failed.
        """
        if threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        checked = check_model_file(model, max_bytes=max_bytes)
        self._model = None
        path = self._transport.put(model.resolve(), sha256=checked.sha256)
        reply = self._request(
            "load",
            about=str(model),
            path=path,
            sha256=checked.sha256,
            threads=threads,
            max_bytes=max_bytes,
        )
        if (reply["classes"], tuple(reply["image_shape"])) != (
            checked.classes,
            checked.image_shape,
        ):
            raise HarnessError(f"{model}: the device sees another model than the workstation")
        self._model = LoadedModel(
            sha256=checked.sha256,
            classes=checked.classes,
            image_shape=checked.image_shape,
            load_ns=reply["load_ns"],
            rss_load_bytes=reply["rss_load_bytes"],
        )
        return self._model

    def set_images(self, images: Images) -> None:
        """Send the images, uint8 [N, C, H, W], that `predict` and `measure` use from now on.

        Raises:
            UsageError: another dtype or shape, or no image.
        """
        images = checked_images(images)
        self._images_shape = None
        path, sha256 = self._put_array(images)
        self._request("images", path=path, sha256=sha256)
        self._images_shape = images.shape

    def predict(
        self,
        delta_255: npt.NDArray[np.integer] | None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        on_progress: Callable[[int], None] | None = None,
    ) -> npt.NDArray[np.int64]:
        """The class the device predicts for every image: int64 [N].

        Args:
            delta_255: added to every image before clipping, integers [C, H, W] in 1/255 units
                (`devices.perturbation`); None for clean images.
            batch_size: images per run of the model.
            on_progress: called with the number of images done, about once a second or per batch.

        Raises:
            UsageError: shapes that do not fit each other.
            MeasurementInvalid: logits that are not finite.
            DeviceUnreachable: the runner ended or fell silent.
        """
        shape = self._ready()
        if batch_size < 1:
            raise UsageError(f"batch size must be at least 1, got {batch_size}")
        attack: dict[str, Any] = {}
        if delta_255 is not None:
            path, sha256 = self._put_array(checked_delta(delta_255, image_shape=shape[1:]))
            attack = {"delta": path, "delta_sha256": sha256}
        predictions = np.empty(shape[0], dtype=np.int64)
        start, chunk = 0, batch_size
        while start < shape[0]:
            stop = min(start + chunk, shape[0])
            began_s = time.monotonic()
            predictions[start:stop] = self._predict_range(start, stop, batch_size, attack)
            if on_progress is not None:
                on_progress(stop)
            if time.monotonic() - began_s < CHUNK_S:
                chunk *= 2  # in whole batches, so that chunks never change a batch
            start = stop
        return predictions

    def _predict_range(
        self, start: int, stop: int, batch_size: int, attack: dict[str, Any]
    ) -> list[int]:
        reply = self._request("predict", start=start, stop=stop, batch_size=batch_size, **attack)
        predictions: list[int] = reply["predictions"]
        if len(predictions) != stop - start:
            raise HarnessError(
                f"the device returned {len(predictions)} predictions for images {start} to {stop}"
            )
        return predictions

    def measure(
        self, *, warmup_runs: int, warmup_seconds: float, min_runs: int, min_seconds: float
    ) -> LatencyProcess:
        """Batch-1 latency of the loaded model, which must not have run yet; images cycle.

        Warm-up and measurement each last until both their counts and their seconds are reached.

        Raises:
            UsageError: shapes that do not fit each other, or a model that has run.
        """
        self._ready()
        assert self._model is not None
        reply = self._request(
            "latency",
            timeout_s=self._reply_timeout_s + warmup_seconds + min_seconds,
            warmup_runs=warmup_runs,
            warmup_seconds=warmup_seconds,
            min_runs=min_runs,
            min_seconds=min_seconds,
        )
        return LatencyProcess(
            load_ns=self._model.load_ns,
            first_ns=reply["first_ns"],
            warmup_ns=tuple(reply["warmup_ns"]),
            samples_ns=tuple(reply["samples_ns"]),
            telemetry=tuple(reply["telemetry"]),
            rss_load_bytes=reply["rss_load_bytes"],
            rss_peak_bytes=reply["rss_peak_bytes"],
        )

    def _ready(self) -> tuple[int, ...]:
        """Shape of the images, which must be there, as must a model that takes them."""
        if self._model is None or self._images_shape is None:
            raise UsageError("load a model and set images first")
        if self._images_shape[1:] != self._model.image_shape:
            raise UsageError(
                f"the model takes images {self._model.image_shape},"
                f" these are {self._images_shape[1:]}"
            )
        return self._images_shape

    def _put_array(self, array: npt.NDArray[Any]) -> tuple[str, str]:
        path = self._folder / f"{next(self._files)}.npy"
        np.save(path, array, allow_pickle=False)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self._transport.put(path, sha256=sha256), sha256

    def _request(
        self, operation: str, *, timeout_s: float | None = None, about: str = "", **values: Any
    ) -> dict[str, Any]:
        """One question, its answer; `about` names what the user should look at on failure."""
        identity = next(self._ids)
        self._transport.send(json.dumps({"id": identity, "op": operation, **values}))
        limit_s = self._reply_timeout_s if timeout_s is None else timeout_s
        reply = _parse_reply(self._transport.receive(timeout_s=limit_s))
        if reply.get("id") != identity:
            raise DeviceUnreachable(f"the runner answered {reply.get('id')}, not {identity}")
        if reply.get("ok") is True:
            return reply
        message = str(reply.get("error", "no reason given"))
        error = ERRORS.get(str(reply.get("kind")), HarnessError)
        raise error(f"{about}: {message}" if about else message)


def _parse_reply(line: str) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        raise DeviceUnreachable(f"the runner sent what is not its protocol: {line[:200]!r}")
    return reply


@contextmanager
def open_session(
    transport: Transport, *, reply_timeout_s: float = REPLY_TIMEOUT_S
) -> Iterator[DeviceSession]:
    """Start a runner over `transport`; end it with the context, at once if the context failed.

    Raises:
        DeviceUnreachable: the runner does not start or does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="harness-device-") as folder:
        try:
            transport.start()
            yield DeviceSession(transport, folder=Path(folder), reply_timeout_s=reply_timeout_s)
        except BaseException:  # Ctrl-C too: whatever the runner is doing, nobody waits for it
            transport.close(kill=True)
            raise
        transport.close()
