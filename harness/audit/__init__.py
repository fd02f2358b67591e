"""The audit: which undocumented choices carry the paper's conclusions."""
