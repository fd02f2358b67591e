"""By which predictions models are compared that a device gave only some of the images.

An exported file that answered as PyTorch does, wherever it was compared, and on enough images, is
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
from reports.view import RunKey, by_torch

MOST_UNSEEN = MARGIN / 2
"""Share of all images on which a file may answer otherwise though none of its sample showed it, at
most (exact, 95 % for each run): what two such files leave open does not make up a difference to
choose by. Beyond it (of 10,000 images, fewer than 118 on the device) a sample speaks for itself."""


def agreed(answers: Mapping[RunKey, Classes]) -> dict[RunKey, Classes]:
    """int64 [N] of every run: PyTorch's in place of a sample's that agrees; `UNSEEN` outside one.

    Args:
        answers: of every run; `UNSEEN` outside a sample.
    """
    # Of what differs in one place or under one perturbation it is not known where else.
    differs = {key[0] for key, found in answers.items() if differing(key, found, answers)}
    judged = dict(answers)
    for key, found in answers.items():
        torch = answers.get(by_torch(key))
        seen = int(np.count_nonzero(found != UNSEEN))
        if torch is None or seen == found.size or bool((torch == UNSEEN).any()):
            continue
        if key[0] not in differs and seen > 0 and unseen_share(seen, found.size) <= MOST_UNSEEN:
            judged[key] = torch
    return judged


def differing(key: RunKey, found: Classes, answers: Mapping[RunKey, Classes]) -> int:
    """On how many images that both saw a run's answers are not PyTorch's."""
    torch = answers.get(by_torch(key))
    if torch is None:
        return 0
    both = (found != UNSEEN) & (torch != UNSEEN)
    return int(np.count_nonzero(found[both] != torch[both]))


def unseen_share(seen: int, images: int) -> float:
    """Share of all images that may differ, at most (exact, 95 %), where of those seen none does."""
    return most_unseen(seen, population=images) / images
