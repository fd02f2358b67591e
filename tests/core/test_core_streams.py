"""Standard output is data, whoever prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.streams import stdout_spared


def test_what_is_printed_past_python_goes_to_standard_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with stdout_spared():
        sys.stdout.write("by Python\n")
        os.write(1, b"past it\n")
    sys.stdout.write("data\n")
    seen = capfd.readouterr()
    assert seen.out == "data\n"
    assert sorted(seen.err.split("\n")) == ["", "by Python", "past it"]


def test_a_failure_inside_leaves_standard_output_where_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyError), stdout_spared():
        raise KeyError
    os.write(1, b"data\n")
    assert capfd.readouterr().out == "data\n"


def test_a_closed_standard_output_is_no_error() -> None:
    code = "from harness.streams import stdout_spared\nwith stdout_spared(): print('x')"
    command = f'"{sys.executable}" -c "{code}" >&-'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "x\n")
