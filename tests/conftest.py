"""Loaded before any test module, so before torch."""

from __future__ import annotations

import os

# As `harness` itself does: threads that spin while they wait make small models tens of times
# slower on busy cores. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
