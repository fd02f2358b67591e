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


def test_what_waits_in_a_buffer_of_c_goes_there_too() -> None:
    code = (
        "import ctypes, sys\n"
        "from harness.streams import stdout_spared\n"
        "with stdout_spared():\n"
        "    ctypes.CDLL(None).printf(b'by C\\n')\n"
        "    sys.__stdout__.write('by an old handle\\n')\n"
        "print('data')\n"
    )
    there = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=there, check=True)
    assert done.stdout == "data\n"
    assert sorted(done.stderr.split("\n")) == ["", "by C", "by an old handle"]


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
