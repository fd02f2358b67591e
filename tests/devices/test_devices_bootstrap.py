"""From a bare board to one that runs models; what is refused, and what is left behind."""

from __future__ import annotations

import ast
import fcntl
import json
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("asyncssh")  # before ssh_boards, which needs it

from ssh_boards import LIMITS, OpenSsh, User, board_profile, device

from devices.bootstrap import PROGRAM, Environment, bootstrap, read_environment
from devices.emulated import EmulatedDevice, emulated_python
from devices.ssh import board_of
from devices.wheels import Target
from harness.records import DeviceUnreachable, HarnessError, UsageError

PYTHON = "cp{}{}".format(*sys.version_info[:2])
MACHINE = sysconfig.get_platform().rsplit("-", 1)[-1]


def bare_python() -> list[str]:
    """This machine's Python without any packages: what a board has before it is set up."""
    base = Path(sys.base_prefix) / "bin" / "python3"
    return [str(base if base.exists() else sys.executable), "-S"]


@pytest.fixture
def bare(ssh_user: User, tmp_path: Path) -> Iterator[OpenSsh]:
    """A board whose python3 has no packages."""
    server = OpenSsh(tmp_path / "board", ssh_user, bare_python())
    server.start()
    yield server
    server.stop()


def wheel(folder: Path, name: str, version: str, code: str) -> None:
    """A real wheel for this machine's Python, of a package that is one file."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-{PYTHON}-{PYTHON}-manylinux_2_17_{MACHINE}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n{code}\n")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch) -> Path:
    """What pip finds: a folder, and nothing else."""
    folder = tmp_path / "index"
    wheel(folder, "numpy", "2.0.0", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def set_up(**changes: str) -> tuple[Environment, list[str]]:
    told: list[str] = []
    return bootstrap(board_profile(**changes), progress=told.append, limits=LIMITS), told


def refused(error: type[HarnessError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        set_up()
    assert "\n" not in str(caught.value)


def nothing_half_done(server: OpenSsh) -> bool:
    environments = server.root / "environments"
    parts = list(environments.glob(".*")) if environments.exists() else []
    return not parts and not server.left_over() and not (server.root / "environment.json").exists()


def lying(server: OpenSsh, **facts: object) -> None:
    """Make the board's python3 say other things of itself."""
    patched = server.programs / "patched.py"
    lie = f"def lie(request):\n    return {{**facts(request), **{facts!r}}}\n"
    lie += "OPERATIONS['facts'] = lie\n"
    patched.write_text(
        "import sys\n"
        f"program = sys.stdin.read().replace('def main()', {lie!r} + 'def main()')\n"
        "exec(compile(program, 'on_board', 'exec'), {'__name__': '__main__'})\n"
    )
    real = (server.programs / "python3").read_text().splitlines()[1].removeprefix("exec ")
    real = real.removesuffix(' "$@"')
    server.program("python3", f'[ "$1" = - ] && exec {real} {patched} "$2"\nexec {real} "$@"')


def test_what_runs_on_a_bare_board_needs_only_python_3_9() -> None:
    tree = ast.parse(PROGRAM.read_text(), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= sys.stdlib_module_names


def test_wheels_are_chosen_for_the_boards_libc() -> None:
    tags = Target("aarch64", (3, 11), (2, 19)).platforms
    assert tags == [
        "manylinux_2_19_aarch64",
        "manylinux_2_18_aarch64",
        "manylinux_2_17_aarch64",
        "manylinux2014_aarch64",
    ]


def test_a_bare_board_gets_a_virtual_environment(bare: OpenSsh, index: Path) -> None:
    wheel(index, "onnxruntime", "1.30.0", "")
    environment, told = set_up()
    assert (environment.kind, environment.onnxruntime, environment.numpy) == (
        "venv",
        "1.30.0",
        "2.0.0",
    )
    assert any("set up: onnxruntime 1.30.0" in line for line in told)
    folder = bare.root / environment.folder
    assert (folder / "pyvenv.cfg").exists()
    assert list(folder.glob("lib/python*/site-packages/onnxruntime/__init__.py"))
    assert bare.left_over() == []
    assert not list((bare.root / "environments").glob(".*"))
    marker = json.loads((bare.root / "environment.json").read_text())
    assert marker == {**environment.__dict__}


def test_it_is_done_once(bare: OpenSsh, index: Path, monkeypatch) -> None:
    wheel(index, "onnxruntime", "1.30.0", "")
    monkeypatch.setattr("devices.wheels.wanted_onnxruntime", lambda: "1.30.0")
    monkeypatch.setattr("devices.bootstrap.wanted_onnxruntime", lambda: "1.30.0")
    first, _ = set_up()
    for path in index.iterdir():
        path.unlink()
    second, told = set_up()
    assert second == first
    assert told == ["board is set up: onnxruntime 1.30.0"]


def test_an_environment_that_no_longer_works_is_built_anew(bare, index, monkeypatch) -> None:
    wheel(index, "onnxruntime", "1.30.0", "")
    monkeypatch.setattr("devices.bootstrap.wanted_onnxruntime", lambda: "1.30.0")
    first, _ = set_up()
    (package,) = (bare.root / first.folder).glob("lib/python*/site-packages/onnxruntime")
    (package / "__init__.py").write_text("raise SystemExit(3)\n")
    assert set_up()[0] == first
    assert "1.30.0" in (package / "__init__.py").read_text()


def test_a_python_that_makes_no_environments_gets_a_folder(bare, index) -> None:
    wheel(index, "onnxruntime", "1.30.0", "")
    # Debian ships parts of venv apart; here it fails to import.
    broken = bare.home / "broken"
    broken.mkdir()
    (broken / "venv.py").write_text("raise ImportError('no venv here')\n")
    real = (bare.programs / "python3").read_text().splitlines()[1]
    bare.program("python3", f"PYTHONPATH=$PYTHONPATH:{broken}; export PYTHONPATH\n{real}")
    environment, _ = set_up()
    assert environment.kind == "folder"
    assert (bare.root / environment.folder / "site" / "onnxruntime").is_dir()


def test_a_version_that_dies_is_replaced_by_an_older_one(bare: OpenSsh, index: Path) -> None:
    die = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    wheel(index, "onnxruntime", "1.31.0", die)
    wheel(index, "onnxruntime", "1.30.0", "")
    environment, told = set_up()
    assert environment.onnxruntime == "1.30.0"
    assert any("onnxruntime 1.31.0 dies there (SIGILL): trying an older one" in t for t in told)
    assert [path.name for path in (bare.root / "environments").iterdir()] == [
        environment.folder.split("/")[1]
    ]


def test_a_board_that_needs_an_older_version_is_set_up_once(
    bare: OpenSsh, index: Path, monkeypatch
) -> None:
    for module in ("wheels", "bootstrap"):
        monkeypatch.setattr(f"devices.{module}.wanted_onnxruntime", lambda: "1.31.0")
    wheel(index, "onnxruntime", "1.31.0", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    wheel(index, "onnxruntime", "1.30.0", "")
    first, _ = set_up()
    assert (first.onnxruntime, first.wanted) == ("1.30.0", "1.31.0")
    second, told = set_up()
    assert second == first
    assert told == ["board is set up: onnxruntime 1.30.0"]


def test_the_environment_before_goes_when_nobody_uses_it(
    bare: OpenSsh, index: Path, monkeypatch
) -> None:
    def want(version: str) -> Path:
        for module in ("wheels", "bootstrap"):
            monkeypatch.setattr(f"devices.{module}.wanted_onnxruntime", lambda: version)
        wheel(index, "onnxruntime", version, "")
        environment, _ = set_up()
        assert environment.onnxruntime == version
        return bare.root / environment.folder

    first = want("1.29.0")
    with (bare.root / "lock").open("w") as lock:  # somebody measures with it
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = want("1.30.0")
        assert first.exists()
    third = want("1.31.0")
    assert [path.exists() for path in (first, second, third)] == [False, False, True]


def test_a_damaged_wheel_on_the_board_is_sent_again(bare: OpenSsh, index: Path) -> None:
    wheel(index, "onnxruntime", "1.30.0", "")
    set_up()
    (bare.root / "environment.json").unlink()
    for path in (bare.root / "files").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    environment, _ = set_up()
    assert environment.onnxruntime == "1.30.0"


def test_a_version_that_fails_to_import_is_one_line(bare: OpenSsh, index: Path) -> None:
    wheel(index, "onnxruntime", "1.30.0", "raise ImportError('libatomic.so.1 is missing')")
    refused(HarnessError, r"1\.30\.0 does not run there: .*libatomic\.so\.1 is missing")
    assert nothing_half_done(bare)


def test_no_wheel_for_the_board_is_one_line(bare: OpenSsh, index: Path, monkeypatch) -> None:
    # An index that lists it, for other Pythons; one that lists nothing may be out of reach.
    refused(HarnessError, "pip cannot fetch onnxruntime")
    monkeypatch.setattr("devices.wheels._lists", lambda _package: True)
    refused(HarnessError, rf"no onnxruntime for {MACHINE}, Python 3\.\d+, glibc")
    assert nothing_half_done(bare)


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"pointer_bits": 32, "machine": "aarch64"}, r"a 32-bit system \(aarch64\).*64-bit Rasp"),
        ({"machine": "riscv64"}, "is a riscv64: onnxruntime has wheels for aarch64 and x86_64"),
        ({"python": [3, 7, 3]}, r"CPython 3\.7: CPython 3\.9 or newer"),
        ({"implementation": "PyPy"}, "PyPy"),
        ({"libc": ""}, "does not use glibc"),
        ({"pointer_bits": None}, "says nonsense of itself"),
        ({"free_bytes": 1000}, "its disk is too full: setting it up takes"),
    ],
)
def test_a_board_that_cannot_run_it_is_one_line(bare, index, facts: dict, match: str) -> None:
    wheel(index, "onnxruntime", "1.30.0", "")
    lying(bare, **facts)
    refused(HarnessError, match)
    assert nothing_half_done(bare)


def test_a_board_whose_python_is_broken_is_one_line(bare: OpenSsh) -> None:
    bare.program("python3", "echo Segmentation fault >&2; exit 139")
    refused(HarnessError, "its python3 does not work: Segmentation fault")


def test_a_board_without_python3_is_one_line(bare: OpenSsh) -> None:
    bare.program("python3", "exit 127")
    refused(DeviceUnreachable, "board has no python3: sudo apt-get install python3")


def test_a_damaged_wheel_is_not_unpacked(bare: OpenSsh, index: Path) -> None:
    """The board takes every file for right, and flips a bit of each."""
    wheel(index, "onnxruntime", "1.30.0", "")
    bare.program(
        "sha256sum",
        'printf "?" | dd of="$2" conv=notrunc 2>&-\nname=$(basename "$2"); echo "${name%%.*}  $2"',
    )
    refused(HarnessError, r"cannot unpack wheels: ValueError: the wheel .* has sha256")
    assert nothing_half_done(bare)


MARKERS = [
    b"",
    b"nonsense",
    b"[]",
    b'{"kind": "venv"}',
    b'{"kind": "venv", "folder": "../../bin", "onnxruntime": "1", "numpy": "2"}',
    b'{"kind": "venv", "folder": "environments/../..", "onnxruntime": "1", "numpy": "2"}',
    b'{"kind": "venv", "folder": 7, "onnxruntime": "1", "numpy": "2"}',
    b'{"kind": "venv", "folder": null, "onnxruntime": "1", "numpy": "2"}',
    b'{"kind": "shell", "folder": "environments/0123456789abcdef", "onnxruntime": "1",'
    b' "numpy": "2"}',
]


def test_a_marker_that_says_nonsense_is_not_believed(openssh: OpenSsh) -> None:
    board = board_of(board_profile(), limits=LIMITS)
    board.connect()
    try:
        assert read_environment(board) is not None
        for marker in MARKERS:
            (openssh.root / "environment.json").write_bytes(marker)
            assert read_environment(board) is None, marker
    finally:
        board.close()


def test_a_device_without_a_host() -> None:
    with pytest.raises(UsageError, match=r"board has no host: harness devices add board --host"):
        set_up(host=None)


def test_a_board_with_its_own_onnxruntime_is_taken_as_it_is(openssh: OpenSsh) -> None:
    import onnxruntime

    (openssh.root / "environment.json").unlink()
    environment, told = set_up()
    assert environment == Environment(
        "system", None, onnxruntime.__version__, np.__version__, onnxruntime.__version__
    )
    assert told == [f"board: its own python3 has onnxruntime {onnxruntime.__version__}"]


# --- with what the index really has --------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize("kind", ["host", "emulated"])
def test_real_wheels_on_a_bare_board(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    model,
    images,
) -> None:
    """A device that was never set up predicts: by itself, without anything on the board."""
    python = bare_python()
    if kind == "emulated":
        emulated: EmulatedDevice = request.getfixturevalue("emulated_rpi4")
        # Found before HOME is another: -S hides the packages that came with the emulator.
        python = [*emulated_python(emulated.profile), "-S"]
    user = request.getfixturevalue("ssh_user")
    server = OpenSsh(tmp_path / "board", user, python)
    server.start()
    told: list[str] = []
    try:
        with device(notice=told.append).open() as session:
            session.load(model.path, threads=1)
            session.set_images(images)
            np.testing.assert_array_equal(session.predict(None), model.classes(images))
            arch = session.machine.arch
    finally:
        server.stop()
    assert arch == ("aarch64" if kind == "emulated" else MACHINE)
    marker = json.loads((server.root / "environment.json").read_text())
    # No program can be started inside the emulator: its virtual environments do not work.
    assert marker["kind"] == ("folder" if kind == "emulated" else "venv")
    assert server.left_over() == []
