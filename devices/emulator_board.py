"""What an emulated program finds in /proc and /sys: a board's files, not this machine's.

Enters: the core to pretend. Leaves: files below the emulated root, which QEMU shows to programs
in place of the real ones. onnxruntime asks them which core it runs on (QEMU 7.2: crashes on an x86
/proc/cpuinfo) and chooses kernels by the answer, and the runner reports them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cache:
    """One cache of a core, in the words of sysfs."""

    kind: str
    level: int
    size: str
    shared: bool = False
    """By all cores, or each its own."""


@dataclass(frozen=True)
class Board:
    """A board as its kernel describes it."""

    model: str
    cores: int
    part: str
    variant: str
    revision: str
    features: str
    min_khz: int
    max_khz: int
    caches: tuple[Cache, ...]


BOARDS: dict[str, Board] = {
    "cortex-a72": Board(
        model="Raspberry Pi 4 Model B (emulated by QEMU)",
        cores=4,
        part="0xd08",
        variant="0x0",
        revision="3",
        features="fp asimd evtstrm crc32 cpuid",
        min_khz=600_000,
        max_khz=1_800_000,
        caches=(
            Cache("Data", 1, "32K"),
            Cache("Instruction", 1, "48K"),
            Cache("Unified", 2, "1024K", shared=True),
        ),
    ),
    "cortex-a76": Board(
        model="Raspberry Pi 5 Model B (emulated by QEMU)",
        cores=4,
        part="0xd0b",
        variant="0x4",
        revision="1",
        features=(
            "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm"
            " lrcpc dcpop asimddp"
        ),
        min_khz=1_500_000,
        max_khz=2_400_000,
        caches=(
            Cache("Data", 1, "64K"),
            Cache("Instruction", 1, "64K"),
            Cache("Unified", 2, "512K"),
            Cache("Unified", 3, "2048K", shared=True),
        ),
    ),
}
"""QEMU's name of a core -> the board that has it."""


def write_board(root: Path, board: Board) -> None:
    """Write `board`'s files below `root`."""
    for path, text in _files(board):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def _files(board: Board) -> list[tuple[str, str]]:
    everyone = f"0-{board.cores - 1}\n"
    cpus = "sys/devices/system/cpu"
    files = [(f"{cpus}/{name}", everyone) for name in ("possible", "present", "online")]
    files.append(("proc/device-tree/model", board.model + "\0"))
    files.append(("proc/cpuinfo", _cpuinfo(board)))
    for core in range(board.cores):
        folder = f"{cpus}/cpu{core}"
        files += [
            (f"{folder}/cpufreq/cpuinfo_min_freq", f"{board.min_khz}\n"),
            (f"{folder}/cpufreq/cpuinfo_max_freq", f"{board.max_khz}\n"),
            (f"{folder}/topology/physical_package_id", "0\n"),
            (f"{folder}/topology/core_id", f"{core}\n"),
            (f"{folder}/topology/thread_siblings_list", f"{core}\n"),
        ]
        lists = ("core_siblings_list", "package_cpus_list", "cluster_cpus_list")
        files += [(f"{folder}/topology/{name}", everyone) for name in lists]
        for index, cache in enumerate(board.caches):
            there = f"{folder}/cache/index{index}"
            files += [
                (f"{there}/type", f"{cache.kind}\n"),
                (f"{there}/level", f"{cache.level}\n"),
                (f"{there}/size", f"{cache.size}\n"),
                (f"{there}/shared_cpu_list", everyone if cache.shared else f"{core}\n"),
                (f"{there}/coherency_line_size", "64\n"),
            ]
    return files


def _cpuinfo(board: Board) -> str:
    cores = [
        f"processor\t: {core}\n"
        "BogoMIPS\t: 108.00\n"
        f"Features\t: {board.features}\n"
        "CPU implementer\t: 0x41\n"
        "CPU architecture: 8\n"
        f"CPU variant\t: {board.variant}\n"
        f"CPU part\t: {board.part}\n"
        f"CPU revision\t: {board.revision}\n\n"
        for core in range(board.cores)
    ]
    return "".join(cores) + f"Model\t\t: {board.model}\n"
