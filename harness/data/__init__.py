"""Data sets by name, in the roles of an experiment; see `harness.data.dataset`."""
