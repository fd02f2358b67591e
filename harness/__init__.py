"""The workstation side of the edge-robustness harness."""
