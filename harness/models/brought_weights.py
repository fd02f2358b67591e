"""The checkpoint of a model that a user brings: any training script's, read as data only.

Enters: a file of torch.save. Leaves: weights in the user's network, all of them, or one line.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.records import UsageError

STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Where training scripts keep the weights in a checkpoint that holds more."""
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and wrappers put before every name."""
NAMES_SHOWN = 3


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights in a user's checkpoint: a state dict, or one among other things.

    Raises:
        UsageError: missing, damaged, holding code, or no weights in it.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except OSError as error:  # what it says of an archive that is cut off
                raise EOFError(str(error)) from None
    except OSError as error:
        raise UsageError(f"cannot read checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:  # a dozen kinds, on bytes that are no checkpoint
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise UsageError(
                f"checkpoint {path} holds more than tensors and plain values; it was not executed. "
                "Save the weights alone: torch.save(model.state_dict(), FILE)"
            ) from None
        raise UsageError(
            f"checkpoint {path} is not a file of torch.save, or is damaged ({one_line(error)})"
        ) from None
    state = _weights_in(content)
    if state is None:
        held = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else ""
        what = f"a dictionary of {held or 'nothing'}" if isinstance(content, dict) else "no weights"
        raise UsageError(
            f"checkpoint {path} holds {what}: it must be a state dict, or hold one under "
            f"{', '.join(STATE_KEYS)}"
        )
    return state


def _weights_in(content: Any) -> dict[str, Tensor] | None:
    candidates = [content]
    if isinstance(content, dict):
        candidates += [content.get(key) for key in STATE_KEYS]
    for found in candidates:
        if (
            isinstance(found, dict)
            and found
            and all(isinstance(key, str) for key in found)
            and any(isinstance(value, Tensor) for value in found.values())
            and not any(isinstance(value, dict) for value in found.values())
        ):
            return found
    return None


def fill(network: nn.Module, state: dict[str, Tensor], path: Path, *, of: str) -> None:
    """Load the weights of the checkpoint `path`, every one; prefixes of wrappers are taken off.

    Raises:
        UsageError: names or shapes that are not those of the network, which `of` calls.
    """
    wanted = network.state_dict()
    while state and not set(state) & set(wanted):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    differences = [
        _some("missing", [key for key in wanted if key not in state]),
        _some("not of the model", [key for key in state if key not in wanted]),
        _some(
            "of another shape",
            [
                f"{key} {list(state[key].shape)} for {list(value.shape)}"
                for key, value in wanted.items()
                if isinstance(value, Tensor)
                and isinstance(state.get(key), Tensor)
                and state[key].shape != value.shape
            ],
        ),
    ]
    if any(differences):
        raise UsageError(
            f"checkpoint {path} does not fit the model of {of}: "
            f"{'; '.join(filter(None, differences))}"
        )
    network.load_state_dict(state)


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > NAMES_SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:NAMES_SHOWN])}{more})"


def one_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:200]}"
