"""A user's folder for the tests of `--factory`: modules as users write them, trained, with data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cli_cases import Outcome, succeeded
from sklearn.datasets import load_digits
from torch import nn

MODULES = ("user_nets", "user_bad", "user_broken", "user_crashing")
EPS = 16
MEAN, STD = 0.4, 0.1

GOOD = """
import torch
from torch import nn

print("made by a user who prints")

class Gray(nn.Module):
    # 1 channel, 28 x 20, convolutions, batch norm, dropout, and a .view
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(32 * 7 * 5, 10)

    def forward(self, x):
        return self.head(self.drop(self.features(x).view(x.shape[0], -1)))

class Attention(nn.Module):
    # 3 channels, 32 x 32, patches, LayerNorm, no convolution
    def __init__(self, width=32, patch=4):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch * patch, width)
        self.place = nn.Parameter(torch.randn(64, width) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))
        self.head = nn.Linear(64 * width, 10)

    def forward(self, x):
        n, p = len(x), self.patch
        t = x.view(n, 3, 8, p, 8, p).permute(0, 2, 4, 1, 3, 5).reshape(n, 64, -1)
        t = self.embed(t) + self.place
        q = self.norm1(t)
        t = t + self.attention(q, q, q, need_weights=False)[0]
        return self.head((t + self.mlp(self.norm2(t))).flatten(1))

class Clamped(Gray):
    def forward(self, x):
        return super().forward(x.clamp(-9, 5.99))

class Talking(Gray):
    def forward(self, x):
        if not x.requires_grad:
            print("forward of a user who prints")
        return super().forward(x)

def gray():
    return Gray()

def clamped():
    return Clamped()

def talking():
    return Talking()

def attention():
    return Attention()
"""

BAD = """
import torch
from torch import nn

number = 3

class Small(nn.Module):
    def __init__(self, classes=10, side=28 * 20):
        super().__init__()
        self.fc = nn.Linear(side, classes)
    def forward(self, x):
        return self.fc(x.flatten(1))

def good(): return Small()
def needs_an_argument(classes): return Small(classes)
def raises(): raise RuntimeError("the disk of weights\\nis missing")
def leaves(): raise SystemExit("usage: train.py")
def no_module(): return {"weights": 1}
def out_of_memory(): raise MemoryError
def five_classes(): return Small(5)
def other_size(): return Small(side=3 * 32 * 32)

class Changed(Small):
    def __init__(self, change):
        super().__init__()
        self.change = change
    def forward(self, x):
        return self.change(super().forward(x))

def returns_tuple(): return Changed(lambda z: (z, z))
def returns_map(): return Changed(lambda z: z[:, :, None, None])
def returns_labels(): return Changed(lambda z: z.argmax(1))
def returns_nan(): return Changed(lambda z: z * float("nan"))
def detached(): return Changed(lambda z: z.detach())
def rounded(): return Changed(lambda z: z.round())
def noisy(): return Changed(lambda z: nn.functional.dropout(z, 0.5))

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Small(), Small()
    def forward(self, x):
        return torch.cat([(self.one if i[0, 0, 13, 9] > 0.5 else self.two)(i) for i in x.split(1)])

class BatchStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.small = nn.BatchNorm2d(1, track_running_stats=False), Small()
    def forward(self, x):
        return self.small(self.norm(x))
"""


OWN_CONFIG = """
dataset = "{npz}"
preset = "quickstart"

[craft]
eps = [4, 16]
transfer_eps = 16.0
targets = [3]
attack_images = 256
epochs = 3

[eval]
images = 0
threads = 1

[latency]
mode = "{latency}"
"""
"""Of a workspace for their own models: two budgets, one target, quick."""


@dataclass(frozen=True)
class Lab:
    """A user's folder: modules, trained checkpoints, data."""

    root: Path


def _data(path: Path, *, height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """800 handwritten digits of low contrast, enlarged; images NCHW and labels of the 600."""
    raw, a, b = load_digits(), height // 8, width // 8
    big = np.kron((90 + 4 * raw.images).astype(np.uint8), np.ones((1, a, b), dtype=np.uint8))
    rows, columns = (height - 8 * a) // 2, (width - 8 * b) // 2
    big = np.pad(big, ((0, 0), (rows, rows), (columns, columns)), constant_values=90)
    images = np.repeat(big[..., None], channels, axis=3)
    np.savez(
        path,
        train_x=images[:600],
        train_y=raw.target[:600],
        test_x=images[1400:1600],
        test_y=raw.target[1400:1600],
    )
    return images[:600].transpose(0, 3, 1, 2), raw.target[:600]


def _train(network: nn.Module, images: np.ndarray, labels: np.ndarray, *, epochs: int) -> None:
    pixels = torch.from_numpy(images).clone(memory_format=torch.contiguous_format)
    x = (pixels.float() / 255 - MEAN) / STD
    y, optimiser = torch.from_numpy(labels), torch.optim.AdamW(network.parameters(), 1e-2)
    steps = epochs * -(-len(x) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(32):
            optimiser.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()
            optimiser.step()
            schedule.step()


GRAY = ("--factory", "user_nets:gray", "--checkpoint", "gray.pt", "--mean", MEAN, "--std", STD)
ATTENTION = (
    *("--factory", "user_nets:attention", "--checkpoint", "attention.pth"),
    *("--mean", f"{MEAN},{MEAN},{MEAN}", "--std", f"{STD},{STD},{STD}"),
)


def make_lab(root: Path) -> Lab:
    """Their modules, two trained models, the data of each."""
    (root / "user_nets.py").write_text(GOOD)
    (root / "user_bad.py").write_text(BAD)
    (root / "user_broken.py").write_text("import not_a_module_of_anybody")
    (root / "user_crashing.py").write_text("1 / 0")
    scope: dict[str, Any] = {}
    exec(GOOD, scope)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gray, attention = scope["gray"](), scope["attention"]()
    _train(gray, *_data(root / "gray.npz", height=28, width=20, channels=1), epochs=3)
    _train(attention, *_data(root / "colour.npz", height=32, width=32, channels=3), epochs=3)
    torch.set_num_threads(threads)
    torch.save(gray.state_dict(), root / "gray.pt")
    of_a_cluster = {f"module.{key}": value for key, value in attention.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": of_a_cluster}, root / "attention.pth")
    return Lab(root)


def own(checkpoint: Path, name: str) -> tuple[object, ...]:
    """Another model of the same code."""
    return (*GRAY[:2], "--checkpoint", checkpoint, *GRAY[4:], "--name", name)


def of_results(run: Callable[..., Outcome], root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(
        succeeded(run("results", "--json", "--workspace", root, cwd=root)).out
    )
    return rows
