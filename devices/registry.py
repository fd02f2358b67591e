"""Which devices there are, by name, and what each is made of."""

from __future__ import annotations

from devices.emulated import EmulatedDevice, is_set_up
from devices.local import LocalDevice
from devices.plain import shortened
from devices.profiles import LOCAL, Profile, profiles, stands_for, user_file
from devices.session import Device
from harness.records import UsageError


def device_named(name: str) -> Device:
    """The device called `name`, not started yet: nothing is connected to, or set up.

    Raises:
        UsageError: no such device, the message lists those there are; or one that is neither
            configured nor can be emulated.
    """
    if name == LOCAL:  # also where the user's file is damaged
        return LocalDevice()
    profile = profile_named(name)
    if profile.host is not None:
        from devices.ssh import SshDevice  # with a library that only boards need

        device: Device = SshDevice(profile, stands_for=stands_for(user_file(), name))
        return device
    if profile.emulate is not None:
        return EmulatedDevice(profile)
    raise UsageError(
        f"{name} has no host, and cannot be emulated: harness devices add {name} --host USER@BOARD"
    )


def how_it_runs(profile: Profile) -> str:
    """In a few words, where the device's models run; looks at this machine only."""
    if profile.name == LOCAL:
        return "this machine"
    if profile.host is not None:
        port = f", port {profile.port}" if profile.port else ""
        return f"over SSH: {profile.host}{port}"
    if profile.emulate is not None:
        state = "set up" if is_set_up(profile) else "set up at first use"
        return f"emulated {profile.emulate}, {state}"
    return "no host yet"


def profile_named(name: str) -> Profile:
    """The profile of the device called `name`.

    Raises:
        UsageError: no such device; the message lists those there are.
    """
    known = profiles(user_file())
    if name not in known:
        raise UsageError(f"unknown device {shortened(name)!r}: choose from {', '.join(known)}")
    return known[name]
