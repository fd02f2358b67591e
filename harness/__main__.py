"""`python -m harness`, where there was no install step."""

from harness.cli.main import main

main()
