"""Which devices there are, by name."""

from __future__ import annotations

from collections.abc import Callable

from devices.local import LocalDevice
from devices.session import Device
from harness.records import UsageError

DEVICES: dict[str, Callable[[], Device]] = {"local": LocalDevice}
"""Name on the command line -> how to make the device. Making it starts nothing."""


def device_named(name: str) -> Device:
    """The device called `name`, not started yet.

    Raises:
        UsageError: no such device; the message lists those there are.
    """
    try:
        make = DEVICES[name]
    except KeyError:
        known = ", ".join(sorted(DEVICES))
        raise UsageError(f"unknown device {name!r}: choose from {known}") from None
    return make()
