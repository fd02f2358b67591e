"""Where inference runs: the on-device runner, the devices, the latency protocol. Never torch."""
