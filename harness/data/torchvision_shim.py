"""`import torchvision` where its compiled operators do not load.

The CPU build of torch 2.13 with torchvision 0.28 from the package index fails on import with
"operator torchvision::nms does not exist": the extension that defines it is built against CUDA
torch. Data sets and transforms need no operator, only that the names exist. So: import; when that
fails for this reason, declare the two names (without an implementation) and import again.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from harness.records import HarnessError

if TYPE_CHECKING:  # two seconds that digits, FILE.npz and FOLDER need not wait
    import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a Library that is collected takes its names with it


def import_torchvision() -> ModuleType:
    """The torchvision module, with `torchvision.datasets` and `torchvision.transforms` usable.

    Raises:
        HarnessError: torchvision is not installed, or is broken in another way.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise HarnessError(
            f"torchvision cannot be imported ({_one_line(error)}): pip install torchvision, "
            "or use the data sets that do not need it: digits, FILE.npz, FOLDER"
        ) from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise HarnessError(
                f"torchvision fails on import ({_one_line(error)}): install the torchvision "
                "release that belongs to this torch"
            ) from error
    # Only now: declaring the names first would clash with an extension that does load.
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]  # what the failed import left behind
    _declare_missing_operators()
    return importlib.import_module("torchvision")


def _declare_missing_operators() -> None:
    import torch

    missing = [name for name in ("nms", "qnms") if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "DEF")
        for name in missing:
            library.define(name + _SCHEMA)
        _declared.append(library)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
