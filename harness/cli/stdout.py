"""Standard output as a rich console, for tables."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console


class StdoutConsole(Console):
    """A console whose reader may go away (`harness results | head`) without that being a failure.

    Rich ends the process with 1 then; here `harness.cli.main` decides, as for plain text.
    """

    def on_broken_pipe(self) -> NoReturn:
        """Called inside the handler of the BrokenPipeError."""
        raise BrokenPipeError
