"""The stages of an experiment: each reads files and writes files."""
