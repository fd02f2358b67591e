"""Loaded before any test module, so before torch."""

from __future__ import annotations

import os
import signal

# Threads that spin while they wait make small models tens of times slower on busy cores; tests
# share theirs with the processes they start. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Started in the background of a script, a process inherits that Ctrl-C is ignored, and so would
# every process the tests start and interrupt. Python's own handler is what users have.
signal.signal(signal.SIGINT, signal.default_int_handler)
