"""The program that runs on the device: JSON lines in, predictions and raw timings out.

One file, whatever its length, that needs only python3 (3.9 or later), numpy and onnxruntime: it
is copied to boards that have nothing else, and imports nothing of the harness. It keeps one model
and one set of images loaded, answers one request a line, and ends when its standard input does.

    {"id": 1, "op": "load", "path": "model.onnx", "sha256": "...", "threads": 1, ...}
    {"id": 1, "ok": true, "classes": 10, ...}
    {"id": 1, "ok": false, "kind": "usage", "error": "one line"}

`kind` is usage (the request is wrong), checksum (a file is not the one meant), output (the model
returned nonsense), memory, or runtime. Standard output is the protocol; whatever else prints
there is sent to standard error. Times are nanoseconds, sizes bytes. The operations are the
functions in OPERATIONS; their docstrings say what each needs and returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PROTOCOL = 1
HASH_CHUNK_BYTES = 1 << 20
ERROR_LINE_CHARS = 500
TELEMETRY_PERIOD_S = 1.0
VCGENCMD_TIMEOUT_S = 2.0
THROTTLED_NOW = 0xF
"""vcgencmd get_throttled: under-voltage, capped, throttled, soft limit - at this moment."""
THROTTLED_SINCE_BOOT = 0xF0000
"""The same four, sticky since boot: only a bit that was not set before says anything of us."""
CPU_PARTS = {"0xd03": "Cortex-A53", "0xd08": "Cortex-A72", "0xd0b": "Cortex-A76"}
"""Arm kernels name no model, only a part number; these are the boards the harness profiles."""

Reply = dict[str, Any]
ROOT = Path("/")


class Refused(Exception):
    """A request that cannot be served; `kind` tells the workstation whose fault it is."""

    def __init__(self, message: str, kind: str = "usage") -> None:
        super().__init__(message)
        self.kind = kind


class State:
    """What stays loaded between requests."""

    def __init__(self) -> None:
        self.session: Any = None
        self.image_shape: tuple[int, ...] = ()
        self.classes = 0
        self.one_at_a_time = False
        self.has_run = False
        self.rss_load_bytes: int | None = None
        self.images: npt.NDArray[np.uint8] | None = None
        self.maxrss_start_bytes = maxrss_bytes()


# --- operations --------------------------------------------------------------------------------


def hello(_state: State, _request: Reply) -> Reply:
    """Facts of the machine. Imports onnxruntime, so a board that cannot says so here."""
    import onnxruntime

    return {
        "protocol": PROTOCOL,
        "arch": platform.machine(),
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "os": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "pointer_bits": 8 * struct.calcsize("P"),
        "board": read_text(ROOT / "proc/device-tree/model"),
        "pid": os.getpid(),
    }


def load(state: State, request: Reply) -> Reply:
    """Open the model at `path` with `threads`, after checking `sha256` and `max_bytes`.

    `load_ns` is the time onnxruntime takes, from a file the check has just read (warm cache).
    """
    import onnxruntime

    path, threads = str(request["path"]), int(request["threads"])
    if threads < 1:
        raise Refused(f"threads must be at least 1, got {threads}")
    size, limit = Path(path).stat().st_size, int(request["max_bytes"])
    if size > limit:
        raise Refused(f"the model has {size} bytes, the limit is {limit}")
    verify(path, request["sha256"])
    state.session, state.has_run = None, False
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only
    start = time.perf_counter_ns()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Refused(f"onnxruntime {onnxruntime.__version__} cannot load it: {error}") from None
    load_ns = time.perf_counter_ns() - start
    batch, state.image_shape, state.classes = convention(session)
    state.one_at_a_time = batch == 1
    state.session = session
    state.rss_load_bytes = status_bytes("VmRSS")
    return {
        "classes": state.classes,
        "image_shape": list(state.image_shape),
        "load_ns": load_ns,
        "rss_load_bytes": state.rss_load_bytes,
    }


def images(state: State, request: Reply) -> Reply:
    """Keep the images of the .npy file at `path` (uint8 [N, C, H, W]) for what follows."""
    array = read_array(request["path"], request["sha256"])
    if array.dtype != np.uint8 or array.ndim != 4 or not len(array):
        raise Refused(f"images must be uint8 [N, C, H, W], got {array.dtype} {array.shape}")
    state.images = np.ascontiguousarray(array)
    return {"n": len(array)}


def predict(state: State, request: Reply) -> Reply:
    """Classes of the images [start, stop), in batches of `batch_size`.

    With `delta` (the path of an int16 [C, H, W] .npy file, 1/255 units, and `delta_sha256`) the
    model sees the attacked 8-bit image clip(x + delta, 0, 255).
    """
    session, pixels = ready(state)
    start, stop = int(request["start"]), int(request["stop"])
    batch_size = 1 if state.one_at_a_time else int(request["batch_size"])
    if not 0 <= start < stop <= len(pixels) or batch_size < 1:
        raise Refused(f"no range [{start}, {stop}) by {batch_size} in {len(pixels)} images")
    delta = None
    if request.get("delta") is not None:
        delta = read_array(request["delta"], request["delta_sha256"])
        if delta.dtype != np.int16 or delta.shape != pixels.shape[1:]:
            raise Refused(f"delta {delta.dtype} {delta.shape} for images {pixels.shape[1:]}")
        if delta.max() > 255 or delta.min() < -255:  # int16 sums beyond this would wrap
            raise Refused("delta must be within [-255, 255]")
    state.has_run = True
    predictions: list[int] = []
    for low in range(start, stop, batch_size):
        batch = pixels[low : min(low + batch_size, stop)]
        if delta is not None:
            batch = np.clip(batch.astype(np.int16) + delta, 0, 255).astype(np.uint8)
        logits = session.run(["logits"], {"image": batch})[0]
        if logits.shape != (len(batch), state.classes):
            raise Refused(f"logits {logits.shape} for {len(batch)} images", "output")
        bad = ~np.isfinite(logits).all(axis=1)
        if bad.any():
            raise Refused(f"logits of image {low + int(bad.argmax())} are not finite", "output")
        predictions += [int(index) for index in logits.argmax(axis=1)]
    return {"predictions": predictions}


def latency(state: State, request: Reply) -> Reply:
    """Time batch-1 inference: the first run, a warm-up, then the measurement, every sample.

    Warm-up and measurement each last until both their minimum count (`warmup_runs`, `min_runs`)
    and their minimum time inside the model (`warmup_seconds`, `min_seconds`) are reached. Needs a
    model that has not run yet: the first inference can be timed only once.
    """
    session, pixels = ready(state)
    if state.has_run:
        raise Refused("latency needs a model that has not run since it was loaded")
    state.has_run = True
    feeds = [{"image": pixels[i : i + 1]} for i in range(len(pixels))]
    throttled_before = throttled_bits()
    first = time_runs(session, feeds, 1, 0)
    warmup = time_runs(session, feeds, request["warmup_runs"], request["warmup_seconds"] * 1e9)
    with Telemetry(throttled_before) as telemetry:
        samples = time_runs(session, feeds, request["min_runs"], request["min_seconds"] * 1e9)
    return {
        "first_ns": first[0],
        "warmup_ns": warmup,
        "samples_ns": samples,
        "telemetry": telemetry.readings,
        "rss_load_bytes": state.rss_load_bytes,
        "rss_peak_bytes": rss_peak_bytes(state.maxrss_start_bytes),
    }


OPERATIONS: dict[str, Callable[[State, Reply], Reply]] = {
    "hello": hello,
    "load": load,
    "images": images,
    "predict": predict,
    "latency": latency,
    "quit": lambda _state, _request: {},
}


# --- what they are made of ---------------------------------------------------------------------


def time_runs(session: Any, feeds: list[Reply], min_runs: int, min_ns: float) -> list[int]:
    """Nanoseconds of each run, cycling over `feeds`, until both minimums are reached."""
    clock, names = time.perf_counter_ns, ["logits"]
    samples: list[int] = []
    total_ns = 0
    while len(samples) < min_runs or total_ns < min_ns:
        feed = feeds[len(samples) % len(feeds)]
        start = clock()
        session.run(names, feed)
        elapsed_ns = clock() - start
        samples.append(elapsed_ns)
        total_ns += elapsed_ns
    return samples


def ready(state: State) -> tuple[Any, npt.NDArray[np.uint8]]:
    """The session and the images, which must be there and fit each other."""
    if state.session is None or state.images is None:
        raise Refused("load a model and images first")
    if state.images.shape[1:] != state.image_shape:
        raise Refused(f"the model takes {state.image_shape}, images are {state.images.shape[1:]}")
    return state.session, state.images


def convention(session: Any) -> tuple[int | None, tuple[int, ...], int]:
    """(fixed batch or None, image shape [C, H, W], classes) of a model that follows the rules."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if [(i.name, i.type, len(i.shape)) for i in inputs] != [("image", "tensor(uint8)", 4)]:
        raise Refused("the model must take one input `image`, uint8 [N, C, H, W]")
    if [(o.name, o.type, len(o.shape)) for o in outputs] != [("logits", "tensor(float)", 2)]:
        raise Refused("the model must return one output `logits`, float32 [N, classes]")
    batch, *shape = inputs[0].shape
    classes = outputs[0].shape[1]
    if not all(isinstance(size, int) and size > 0 for size in [*shape, classes]):
        raise Refused(f"C, H, W and classes must be fixed, got {shape} and {classes}")
    if isinstance(batch, int) and batch != 1:
        raise Refused(f"the model's batch size must be dynamic or 1, got {batch}")
    return (batch if isinstance(batch, int) else None), tuple(shape), int(classes)


def verify(path: str, sha256: str) -> None:
    """Refuse a file that is not the one the workstation means."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise Refused(f"the file has sha256 {digest.hexdigest()}, not {sha256}", "checksum")


def read_array(path: str, sha256: str) -> npt.NDArray[Any]:
    """A .npy file, verified; never unpickled."""
    verify(path, sha256)
    array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    return array


# --- the machine -------------------------------------------------------------------------------


class Telemetry:
    """Readings at entry, about once a second from a thread of its own, and at exit."""

    def __init__(self, throttled_before: int | None) -> None:
        self.readings: list[Reply] = []
        self._throttled_before = throttled_before
        self._start_ns = time.perf_counter_ns()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Telemetry:
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _watch(self) -> None:
        while not self._stop.wait(TELEMETRY_PERIOD_S):
            self._read()

    def _read(self) -> None:
        elapsed_ns = time.perf_counter_ns() - self._start_ns
        bits = throttled_bits()
        throttled = is_throttled(self._throttled_before, bits)
        reading = {"elapsed_ns": elapsed_ns, "throttled": throttled, "throttled_bits": bits}
        self.readings.append({**reading, **read_telemetry()})


def read_telemetry(root: Path = ROOT) -> Reply:
    """Load, governor, MHz of the fastest core, hottest zone in Celsius. Unknown is None."""
    policies = root / "sys/devices/system/cpu/cpufreq"
    governors = {read_text(path) for path in policies.glob("policy*/scaling_governor")} - {None}
    # The fastest core is the busy one; idle cores would make a steady clock look like a drift.
    mhz = [value / 1e3 for value in read_numbers(policies.glob("policy*/scaling_cur_freq"))]
    if not mhz:
        mhz = [float(value) for key, value in cpuinfo(root) if key == "cpu MHz"]
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    celsius = [value / 1e3 for value in read_numbers(zones)]
    try:
        load_1m: float | None = os.getloadavg()[0]
    except OSError:
        load_1m = None
    return {
        "load_1m": load_1m,
        "governor": ",".join(sorted(map(str, governors))) or None,
        "frequency_mhz": max(mhz) if mhz else None,
        "temperature_c": max(celsius) if celsius else None,
    }


def throttled_bits() -> int | None:
    """The Raspberry Pi firmware's word on throttling, or None where there is no such thing."""
    program = shutil.which("vcgencmd")
    if program is None:
        return None
    try:
        answer = subprocess.run(  # noqa: S603 - a fixed command, no shell
            [program, "get_throttled"],
            capture_output=True,
            text=True,
            timeout=VCGENCMD_TIMEOUT_S,
            check=True,
        )
        return int(answer.stdout.strip().split("=")[1], 16)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def is_throttled(before: int | None, bits: int | None) -> bool | None:
    """Throttled at this moment, or at some moment since `before` was read."""
    if bits is None:
        return None
    return bool(bits & THROTTLED_NOW or bits & ~(before or 0) & THROTTLED_SINCE_BOOT)


def cpu_model() -> str:
    """What /proc/cpuinfo calls the CPU, or the Arm part, or the best the platform knows."""
    facts = dict(reversed(cpuinfo(ROOT)))  # the first entry of each key wins
    part = facts.get("CPU part", "")
    return facts.get("model name") or CPU_PARTS.get(part, part) or platform.processor() or "unknown"


def cpuinfo(root: Path) -> list[tuple[str, str]]:
    """(key, value) of every line of /proc/cpuinfo that has both."""
    lines = (read_text(root / "proc/cpuinfo") or "").splitlines()
    pairs = [tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line]
    return [(key, value) for key, value in pairs if value]


def read_text(path: Path) -> str | None:
    """A small system file, stripped of blanks and of the device tree's NUL; None if absent."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def read_numbers(paths: Any) -> list[float]:
    """The numbers in those of the files that hold one."""
    texts = [read_text(path) or "" for path in paths]
    return [float(text) for text in texts if text.lstrip("-").isdigit()]


def status_bytes(key: str) -> int | None:
    """A size of this process from /proc/self/status (Linux), in bytes."""
    for line in (read_text(Path("/proc/self/status")) or "").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def maxrss_bytes() -> int:
    """Peak RSS as getrusage has it: kilobytes on Linux, bytes on macOS; 0 where there is none."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_peak_bytes(maxrss_start_bytes: int) -> int | None:
    """Peak RSS of this process alone.

    Linux carries ru_maxrss across fork and exec, so a runner started by a process of 500 MB
    would report 500 MB; VmHWM belongs to this program's own memory. Without VmHWM, ru_maxrss is
    believed only if it grew after the start; else the answer is None, not the parent's peak.
    """
    own = status_bytes("VmHWM")
    if own is not None:
        return own
    peak = maxrss_bytes()
    return peak if peak > maxrss_start_bytes else None


# --- the protocol ------------------------------------------------------------------------------


def answer(state: State, line: bytes) -> Reply:
    """The reply to one request line; every failure becomes a reply."""
    identity = None
    try:
        request = json.loads(line)
        identity = request["id"]
        operation = OPERATIONS.get(request.get("op"))
        if operation is None:
            raise Refused(f"unknown operation {request.get('op')!r}")
        return {"id": identity, "ok": True, "op": request["op"], **operation(state, request)}
    except Refused as error:
        kind, message = error.kind, str(error)
    except MemoryError:
        kind, message = "memory", "out of memory"
    except Exception as error:
        kind, message = "runtime", f"{type(error).__name__}: {error}"
    one_line = " ".join(message.split())[:ERROR_LINE_CHARS]
    return {"id": identity, "ok": False, "kind": kind, "error": one_line}


def main() -> int:
    """Serve requests until `quit` or the end of standard input."""
    # onnxruntime 1.29 and later report model names and hashes to their maker unless told not to;
    # which models are attacked here is nobody's business. Read when onnxruntime is imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    # The protocol gets a descriptor of its own; prints, C++ ones included, go to standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    state = State()
    try:
        for line in sys.stdin.buffer:
            reply = answer(state, line)
            channel.write(json.dumps(reply) + "\n")
            channel.flush()
            if reply.get("op") == "quit":
                break
    except BrokenPipeError:  # the workstation is gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), channel.fileno())  # what is left to flush
    return 0


if __name__ == "__main__":
    sys.exit(main())
