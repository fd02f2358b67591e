"""By which predictions models are compared that a device gave only some of the images.

An exported file that answered as PyTorch does, on every image compared and on enough of them, is
taken to be the same function on the others, and compared by PyTorch's predictions of all of them:
a sample alone shows only large differences, and would call whoever differs by less the same. One
that ever answered otherwise is compared on its sample.

Enters: what every run answered. Leaves: what tests are made of.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from harness.metrics import UNSEEN, Classes, most_unseen
from reports.inference import MARGIN
from reports.view import DeviceId, RunKey

MOST_UNSEEN = MARGIN / 2
"""Share of all images on which a file may answer otherwise though none of its sample showed it, at
most (exact, 95 %): what two such files leave open does not make up a difference to choose by.
Beyond it (of 10,000 images, fewer than 118 on the device) a sample speaks for itself."""


def agreed(answers: Mapping[RunKey, Classes]) -> dict[RunKey, Classes]:
    """int64 [N] of every run: PyTorch's in place of a sample's that agrees; `UNSEEN` outside one.

    Args:
        answers: of every run; `UNSEEN` outside a sample.
    """
    differs = {_file(key) for key, found in answers.items() if _differing(key, found, answers)}
    judged = dict(answers)
    for key, found in answers.items():
        torch = answers.get(_by_torch(key))
        seen = int(np.count_nonzero(found != UNSEEN))
        if torch is None or seen == found.size or bool((torch == UNSEEN).any()):
            continue
        if _file(key) not in differs and _enough(seen, found.size):
            judged[key] = torch
    return judged


def agreements(answers: Mapping[RunKey, Classes], device: DeviceId) -> tuple[int, int]:
    """(how many answers of samples on a device were compared with PyTorch's, how many differ)."""
    compared = differing = 0
    for key, found in answers.items():
        torch = answers.get(_by_torch(key))
        if torch is None or key[4] == "torch" or DeviceId(key[2], key[3]) != device:
            continue
        compared += int(np.count_nonzero((found != UNSEEN) & (torch != UNSEEN)))
        differing += _differing(key, found, answers)
    return compared, differing


def _by_torch(key: RunKey) -> RunKey:
    model, uap, _, _, _ = key
    return (model, uap, "local", False, "torch")


def _file(key: RunKey) -> tuple[str, str, bool, str]:
    """One file where it ran: it may agree with PyTorch in one place and not in another."""
    model, _, device, emulated, runtime = key
    return (model, device, emulated, runtime)


def _differing(key: RunKey, found: Classes, answers: Mapping[RunKey, Classes]) -> int:
    torch = answers.get(_by_torch(key))
    if torch is None:
        return 0
    both = (found != UNSEEN) & (torch != UNSEEN)
    return int(np.count_nonzero(found[both] != torch[both]))


def _enough(seen: int, images: int) -> bool:
    return seen > 0 and most_unseen(seen, population=images) <= MOST_UNSEEN * images
