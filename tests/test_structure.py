"""The import order of the design, checked on the source of every module, and what a clone holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("harness", "export", "devices", "reports")
MODULES = sorted(path for package in PACKAGES for path in (REPO / package).rglob("*.py"))
TOP = ("harness.pipeline", "harness.cli", "harness.doctor", "harness.__main__")
"""The only modules of `harness` that may import the packages beside it."""
LONGEST_LINES = 350
MAY_BE_LONGER = {"devices/runner.py"}  # one file by design: it is copied to boards


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it: at the top, in functions, for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # `from harness import metrics` imports harness.metrics.
            if node.module in PACKAGES or (REPO / node.module.replace(".", "/")).is_dir():
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offenders(path: Path, *, allowed: tuple[str, ...], of: tuple[str, ...]) -> set[str]:
    """Imports from the packages `of` that are not `allowed`."""
    return {n for n in imports(path) if within(n, *of) and not within(n, *allowed)}


def in_package(*packages: str) -> list[Path]:
    return [path for path in MODULES if within(module_name(path), *packages)]


def test_the_source_was_found() -> None:
    names = {module_name(path) for path in MODULES}
    assert {"harness.records", "devices.runner", "export.exporter", "reports.report"} <= names
    assert "harness.records" in imports(REPO / "devices" / "session.py")
    assert "harness.metrics" in imports(REPO / "harness" / "results.py")


def test_records_need_the_standard_library_only() -> None:
    roots = {name.partition(".")[0] for name in imports(REPO / "harness" / "records.py")}
    assert roots <= sys.stdlib_module_names


@pytest.mark.parametrize("path", in_package("devices"), ids=module_name)
def test_devices_know_records_only_and_never_torch(path: Path) -> None:
    allowed = ("devices", "harness.records")
    assert not offenders(path, allowed=allowed, of=PACKAGES)
    assert not offenders(path, allowed=(), of=("torch", "torchvision"))


def test_the_runner_needs_numpy_and_onnxruntime_only() -> None:
    roots = {name.partition(".")[0] for name in imports(REPO / "devices" / "runner.py")}
    assert roots - sys.stdlib_module_names == {"numpy", "onnxruntime"}


@pytest.mark.parametrize("path", in_package("reports"), ids=module_name)
def test_reports_read_the_store_only(path: Path) -> None:
    allowed = (
        *("reports", "harness.records", "harness.store", "harness.results", "harness.metrics"),
        *("harness.sampling", "harness.latencies"),  # how stored runs of a measurement add up
        "harness.sources",  # what a stored perturbation's source is called
        *("harness.bootstrap", "harness.seeds"),  # intervals over images and crafting seeds
        "harness.audit",  # what the audit compares
    )
    assert not offenders(path, allowed=allowed, of=PACKAGES)
    assert not offenders(path, allowed=(), of=("torch", "torchvision", "onnxruntime", "onnx"))


@pytest.mark.parametrize("path", in_package("export"), ids=module_name)
def test_export_knows_models_artefacts_and_records_only(path: Path) -> None:
    allowed = ("export", "harness.records", "harness.artefacts", "harness.models")
    assert not offenders(path, allowed=allowed, of=PACKAGES)


CORE = [path for path in in_package("harness") if not within(module_name(path), *TOP)]


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_the_core_knows_nothing_above_it(path: Path) -> None:
    above = ("export", "devices", "reports", *TOP)
    assert not offenders(path, allowed=(), of=above)


@pytest.mark.parametrize("path", in_package("harness.pipeline"), ids=module_name)
def test_the_pipeline_knows_no_command_line(path: Path) -> None:
    assert not offenders(path, allowed=(), of=("harness.cli", "harness.doctor", "reports"))


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=module_name)
def test_package_inits_hold_a_docstring_and_nothing_else(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_stay_readable(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), "says what enters and what leaves"
    name = path.relative_to(REPO).as_posix()
    if name not in MAY_BE_LONGER:
        assert len(source.splitlines()) <= LONGEST_LINES


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"])
def test_the_clone_explains_itself(name: str) -> None:
    assert (REPO / name).stat().st_size > 200


def test_no_committed_file_knows_this_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git clone")
    here = [b"/" + root + b"/" for root in (b"work", b"root")]
    guilty = []
    for name in listed.stdout.decode().split("\0"):
        path = REPO / name
        if name and path.is_file():
            content = path.read_bytes()
            # A path starts after something that is no part of a name: not "net/work/...".
            for prefix in here:
                at = content.find(prefix)
                while at >= 0:
                    before = content[at - 1 : at]
                    if not (before.isalnum() or before in (b".", b"_", b"-", b"}", b"~")):
                        guilty.append(f"{name}: {content[at : at + 40]!r}")
                    at = content.find(prefix, at + 1)
    assert not guilty
