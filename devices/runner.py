"""The program that runs on the device: JSON lines in, predictions and raw timings out.

One file, whatever its length, that needs only python3 (3.9 or later), numpy and onnxruntime: it
is copied to boards that have nothing else, and imports nothing of the harness. It keeps one model
and one set of images loaded, answers one request a line, and ends when its standard input does.

    {"id": 1, "op": "load", "path": "model.onnx", "sha256": "...", "threads": 1, ...}
    {"id": 1, "ok": true, "classes": 10, ...}
    {"id": 1, "ok": false, "kind": "usage", "error": "one line"}

`kind` is usage (the request is wrong), checksum (a file is not the one meant), output (the model
returned nonsense), busy (the board is another's), disk (it is full), memory, or runtime. Standard
output is the protocol; whatever else prints there is sent to standard error. Times are
nanoseconds, sizes bytes. The operations are the functions in OPERATIONS; their docstrings say what
each needs and returns.

    --home FOLDER   keep a journal of every prediction there, and answer from it what it has
    --lock JSON     with --home: one runner at a time; {"holder": "who", "token": "session"}
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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
JOURNAL_PERIOD_S = 0.25
"""How much work a power cut may cost: each write waits for the disk, so not after every image."""
COOLING_LIMIT_S = 300.0
BEAT_PERIOD_S = 5.0
LOCK_EXPIRY_S = 60.0
"""A holder that has not beaten for so long is gone, or hangs."""
IDLE_S = 300.0
"""A runner nobody has asked anything for so long stops beating: its workstation may be gone."""
LOCK_WAIT_S = 5.0
"""A runner whose workstation has just left may still be ending."""
LATENCY_IMAGES = 256
"""At most, of a latency measurement: each is kept twice, clean and attacked."""
UNUSED_S = 60 * 86400.0
PARTIAL_S = 600.0
"""Ages at which a file that nobody used, and a file that was never finished, are removed."""
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
        self.home: Path | None = None
        self.lock: BoardLock | None = None
        self.journal: Journal | None = None
        self.model_key: Reply = {}
        self.images_sha256 = ""


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
        "boot_id": read_text(ROOT / "proc/sys/kernel/random/boot_id"),
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
    state.model_key = {
        "model": request["sha256"],
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
        "cpu": f"{platform.machine()} {cpu_model()}",
    }
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
    state.images_sha256 = str(request["sha256"])
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
    delta = read_delta(request, pixels)
    state.has_run = True
    key = {
        **state.model_key,
        "images": state.images_sha256,
        "delta": request.get("delta_sha256") if delta is not None else None,
        "batch_size": batch_size,
    }
    done: dict[int, int] = {}
    journal = journal_of(state, key)
    if journal is not None:
        done = journal.known
    low = start
    while low < stop:
        if low in done:
            low += 1
            continue
        high = next((i for i in range(low, min(low + batch_size, stop)) if i in done), None)
        high = min(low + batch_size, stop) if high is None else high
        batch = pixels[low:high]
        if delta is not None:
            batch = attacked(batch, delta)
        logits = session.run(["logits"], {"image": batch})[0]
        if logits.shape != (len(batch), state.classes):
            raise Refused(f"logits {logits.shape} for {len(batch)} images", "output")
        bad = ~np.isfinite(logits).all(axis=1)
        if bad.any():
            raise Refused(f"logits of image {low + int(bad.argmax())} are not finite", "output")
        classes = [int(index) for index in logits.argmax(axis=1)]
        if journal is not None:
            journal.add(low, classes)
        else:
            done.update(enumerate(classes, low))
        low = high
    if journal is not None:
        journal.flush()
    return {"predictions": [done[index] for index in range(start, stop)]}


def latency(state: State, request: Reply) -> Reply:
    """Time batch-1 inference: the first run, a warm-up, then the measurement, every sample.

    Warm-up and measurement each last until both their minimum count (`warmup_runs`, `min_runs`)
    and their minimum time inside the model (`warmup_seconds`, `min_seconds`) are reached. Needs a
    model that has not run yet: the first inference can be timed only once.

    With `delta` (as in `predict`) clean and attacked images take turns: runs 0, 2, 4, ... of the
    warm-up and of the measurement are clean, runs 1, 3, 5, ... attacked. With `energy`, the path
    of a sensor, the telemetry has its readings. With `cooling_c` it waits until the board is
    cooler than that.
    """
    session, pixels = ready(state)
    if state.has_run:
        raise Refused("latency needs a model that has not run since it was loaded")
    delta = read_delta(request, pixels)
    energy = None if request.get("energy") is None else Path(request["energy"])
    if energy is not None and read_energy(energy) == {}:
        raise Refused(f"{energy} is no energy sensor: it must hold one whole number")
    if request.get("cooling_c") is not None:
        cool_down(float(request["cooling_c"]))
    state.has_run = True
    feeds = []
    for i in range(min(len(pixels), LATENCY_IMAGES)):
        feeds.append({"image": pixels[i : i + 1]})
        if delta is not None:
            feeds.append({"image": attacked(pixels[i : i + 1], delta)})
    throttled_before = throttled_bits()
    first = time_runs(session, feeds, 1, 0)
    warmup = time_runs(session, feeds, request["warmup_runs"], request["warmup_seconds"] * 1e9)
    with Telemetry(throttled_before, energy) as telemetry:
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


def cool_down(below_c: float) -> None:
    """Wait until the hottest zone is below `below_c`; a board that cannot say is not waited for."""
    deadline_s = time.monotonic() + COOLING_LIMIT_S
    while True:
        now_c = read_telemetry()["temperature_c"]
        if now_c is None or now_c < below_c:
            return
        if time.monotonic() > deadline_s:
            raise Refused(
                f"it has {now_c:g} C and has not cooled below {below_c:g} C in"
                f" {COOLING_LIMIT_S:g} s: cool it, or raise its cooling_c",
                "output",
            )
        time.sleep(1)


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


def read_delta(request: Reply, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16] | None:
    """The perturbation a request names, int16 [C, H, W]; None for clean images."""
    if request.get("delta") is None:
        return None
    delta = read_array(request["delta"], request["delta_sha256"])
    if delta.dtype != np.int16 or delta.shape != pixels.shape[1:]:
        raise Refused(f"delta {delta.dtype} {delta.shape} for images {pixels.shape[1:]}")
    if delta.max() > 255 or delta.min() < -255:  # int16 sums beyond this would wrap
        raise Refused("delta must be within [-255, 255]")
    return delta


def attacked(batch: npt.NDArray[np.uint8], delta: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    """The 8-bit images a model sees under attack."""
    seen: npt.NDArray[np.uint8] = np.clip(batch.astype(np.int16) + delta, 0, 255).astype(np.uint8)
    return seen


# --- what survives a power cut -----------------------------------------------------------------


class Journal:
    """Predictions of one (model, images, delta, ...), on disk before they are told.

    A line is {"start": offset, "predictions": [...]}; the first line is the key. What a power cut
    tore off at the end is cut away when it is opened again. `known` maps image to class.
    """

    def __init__(self, home: Path, key: Reply) -> None:
        head = json.dumps(key, sort_keys=True)
        folder = home / "journal"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise Refused(
                f"{folder} must be a folder, for the journal, and a file is in the way:"
                " move it away",
                "runtime",
            ) from None
        path = folder / (hashlib.sha256(head.encode()).hexdigest() + ".jsonl")
        self.key = key
        self.known: dict[int, int] = {}
        self._pending: list[Reply] = []
        self._written_s = time.monotonic()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        # Two runners without a lock (an emulator's) may share a home: the second only reads.
        self._owned = flock(self._fd)
        self._size = self._read(path, head)
        if self._owned:
            os.utime(self._fd)  # in use: see `sweep`
            os.ftruncate(self._fd, self._size)
            if not self._size:
                self._append([head])
                sync_folder(folder)

    def add(self, start: int, classes: list[int]) -> None:
        """Remember some predictions; every now and then wait until the disk has them."""
        self.known.update(enumerate(classes, start))
        last = self._pending[-1] if self._pending else None
        if last is not None and last["start"] + len(last["predictions"]) == start:
            last["predictions"] += classes
        else:
            self._pending.append({"start": start, "predictions": list(classes)})
        if time.monotonic() - self._written_s >= JOURNAL_PERIOD_S:
            self.flush()

    def flush(self) -> None:
        """Wait until the disk has everything."""
        if self._pending and self._owned:
            self._append([json.dumps(chunk) for chunk in self._pending])
        self._pending = []
        self._written_s = time.monotonic()

    def close(self) -> None:
        """Let another runner have it."""
        os.close(self._fd)

    def _append(self, lines: list[str]) -> None:
        content = "".join(line + "\n" for line in lines).encode()
        written = 0
        try:
            while written < len(content):
                written += os.pwrite(self._fd, content[written:], self._size + written)
            os.fsync(self._fd)
        except OSError:  # a full disk: nothing half-written stays
            with suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise
        self._size += written

    def _read(self, path: Path, head: str) -> int:
        """Read what is whole; its length in bytes."""
        size = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                entry: Any = json.loads(line) if line.endswith(b"\n") else None
                if not size:
                    if json.dumps(entry, sort_keys=True) != head:
                        break
                else:
                    start, classes = int(entry["start"]), entry["predictions"]
                    self.known.update((i, int(c)) for i, c in enumerate(classes, start))
            except (ValueError, TypeError, KeyError):
                break
            size += len(line)
        return size


def journal_of(state: State, key: Reply) -> Journal | None:
    """The journal of `key`, kept open while requests are about the same; None without a home."""
    if state.home is None:
        return None
    if state.journal is None or state.journal.key != key:
        if state.journal is not None:
            state.journal.close()
            state.journal = None
        state.journal = Journal(state.home, key)
    return state.journal


class BoardLock:
    """One runner at a time in a home: a file lock, so that a dead holder holds nothing.

    A holder that lives and is silent (its workstation vanished, it hangs) stops beating and
    expires; one of the same session is an earlier connection's, and ends at once. Beats are the
    file's time, set to the clock since boot: a board without a battery has no other to trust.
    """

    def __init__(self, home: Path, holder: Reply) -> None:
        self.refusal = ""
        self.asked_s = time.monotonic()
        """When a request last ended."""
        self.busy = False
        self._path = home / "lock"
        self._holder = holder
        home.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline_s = time.monotonic() + LOCK_WAIT_S
        while not flock(self._fd):
            self._evict()
            if time.monotonic() > deadline_s:
                self.refusal = f"it is in use by {self._described()}: try again when that has ended"
                return
            time.sleep(0.1)
        facts = {**holder, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(facts).encode(), 0)
        self._beat()
        threading.Thread(target=self._keep_beating, daemon=True).start()

    def _keep_beating(self) -> None:
        while True:
            time.sleep(BEAT_PERIOD_S)
            if self.busy or time.monotonic() - self.asked_s < IDLE_S:
                self._beat()

    def _beat(self) -> None:
        now_ns = time.monotonic_ns()
        with suppress(OSError):
            os.utime(self._path, ns=(now_ns, now_ns))

    def _facts(self) -> Reply:
        try:
            facts = json.loads(os.pread(self._fd, 4096, 0))
            return facts if isinstance(facts, dict) else {}
        except (OSError, ValueError):
            return {}

    def _evict(self) -> None:
        """End the holder if it is ours or has expired, and is what its file says it is."""
        facts = self._facts()
        token, pid = facts.get("token"), facts.get("pid")
        silent_s = time.monotonic() - os.fstat(self._fd).st_mtime_ns / 1e9
        if token != self._holder.get("token") and silent_s < LOCK_EXPIRY_S:
            return
        if not isinstance(pid, int) or pid <= 1 or not isinstance(token, str) or not token:
            return
        with suppress(OSError):
            if token.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    def _described(self) -> str:
        facts = self._facts()
        return f"{facts.get('holder', 'an unknown holder')} since {facts.get('since', 'unknown')}"


def flock(fd: int) -> bool:
    """Lock an open file; False if another process has. Without such locks it counts as locked."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(home: Path) -> None:
    """Remove what no transfer finished, and what nobody has used for long."""
    for folder, pattern, age_s in [
        ("files", "*.part", PARTIAL_S),
        ("files", "*", UNUSED_S),
        ("journal", "*.jsonl", UNUSED_S),
    ]:
        for path in (home / folder).glob(pattern):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > age_s:
                    path.unlink()


def end_with_the_workstation() -> None:
    """End this process as soon as its standard input hangs up, whatever it is doing.

    Nobody would read the answer, and the board is free for the next; the journal has what was done.
    """
    gone = getattr(select, "POLLRDHUP", 0)
    poller = select.poll()
    poller.register(0, gone)
    if poller.poll():
        os._exit(0)


# --- the machine -------------------------------------------------------------------------------


class Telemetry:
    """Readings at entry, about once a second from a thread of its own, and at exit."""

    def __init__(self, throttled_before: int | None, energy: Path | None = None) -> None:
        self.readings: list[Reply] = []
        self._energy = energy
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
        if self._energy is not None:
            reading.update(read_energy(self._energy))
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


def read_energy(sensor: Path) -> Reply:
    """What a sensor file says, labelled by its source; {} where it says nothing.

    A file called like an energy (`energy_uj`, hwmon's `energy1_input`) is a counter of microjoules;
    any other (hwmon's `power1_input`) holds the microwatts of this moment.
    """
    for value in read_numbers([sensor]):
        counter = "energy" in sensor.name
        return {"energy_source": str(sensor), "energy_uj" if counter else "power_uw": value}
    return {}


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
    """The Arm part, what /proc/cpuinfo calls the CPU, or the best the platform knows.

    The part first: under QEMU every Arm core has the same "model name".
    """
    facts = dict(reversed(cpuinfo(ROOT)))  # the first entry of each key wins
    part = facts.get("CPU part", "")
    known = CPU_PARTS.get(part) or facts.get("model name") or part
    return known or platform.processor() or "unknown"


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
        if state.lock is not None and state.lock.refusal:
            raise Refused(state.lock.refusal, "busy")
        return {"id": identity, "ok": True, "op": request["op"], **operation(state, request)}
    except Refused as error:
        kind, message = error.kind, str(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = "disk" if full else "runtime"
        message = "the disk of the device is full" if full else f"{type(error).__name__}: {error}"
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path)
    parser.add_argument("--lock", type=json.loads)
    options = parser.parse_args()
    # The protocol gets a descriptor of its own; prints, C++ ones included, go to standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    state = State()
    state.home = options.home
    if options.home is not None and options.lock is not None:
        threading.Thread(target=end_with_the_workstation, daemon=True).start()
        state.lock = BoardLock(options.home, options.lock)
        if not state.lock.refusal:
            sweep(options.home)
    try:
        for line in sys.stdin.buffer:
            if state.lock is not None:
                state.lock.busy = True
            reply = answer(state, line)
            if state.lock is not None:
                state.lock.busy, state.lock.asked_s = False, time.monotonic()
            channel.write(json.dumps(reply) + "\n")
            channel.flush()
            if reply.get("op") == "quit":
                break
    except BrokenPipeError:  # the workstation is gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), channel.fileno())  # what is left to flush
    return 0


if __name__ == "__main__":
    sys.exit(main())
