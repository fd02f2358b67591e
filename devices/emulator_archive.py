"""Packages of the archive this machine's own apt uses, for any architecture, without root.

Enters: package names. Leaves: verified .deb files in a private folder, or the first problem as a
`SetupFailed`. apt gets a state of its own there: nothing of the machine's changes, no foreign
architecture is registered, and apt itself checks signatures and checksums.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

UPDATE_TIMEOUT_S = 300.0
DOWNLOAD_TIMEOUT_S = 900.0
KEYRINGS = {
    "Debian": ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp"),
    "Ubuntu": ("ubuntu-archive-keyring.gpg",),
}
"""Whose archive -> the keys it must be signed with, where the distribution installs them."""
KEYRING_FOLDER = Path("/usr/share/keyrings")
OS_RELEASE = Path("/etc/os-release")


class SetupFailed(Exception):
    """One line: what of the emulator's set-up failed, and what would help."""


@dataclass(frozen=True)
class Archive:
    """Where this machine's packages come from."""

    uri: str
    suite: str
    origin: str
    keyring: Path | None
    """None: the keys apt trusts anyway."""


def run_program(
    command: Sequence[str | Path],
    *,
    what: str,
    timeout_s: float,
    input_text: str | None = None,
    cwd: Path | None = None,
) -> str:
    """Standard output of a program that must succeed.

    Raises:
        SetupFailed: it is missing, failed or took too long; with its last words.
    """
    try:
        done = subprocess.run(  # noqa: S603 - argument lists of our own making; no shell
            [str(part) for part in command],
            input=input_text,
            stdin=subprocess.DEVNULL if input_text is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            close_fds=False,  # what is inheritable is so on purpose: the lock of the set-up
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except FileNotFoundError:
        raise SetupFailed(f"{command[0]} is not installed") from None
    except OSError as error:
        raise SetupFailed(f"cannot {what}: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise SetupFailed(f"cannot {what}: nothing after {timeout_s:g} s") from None
    if done.returncode == 0:
        return done.stdout
    said = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    # apt names the cause first and what follows from it after; pip the other way round.
    apt = [line.removeprefix("E: ") for line in said if line.startswith("E: ")][:1]
    pip = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")][-1:]
    reason = (apt or pip or said[-1:] or [f"exit code {done.returncode}"])[0]
    raise SetupFailed(f"cannot {what}: {reason}")


def host_architecture() -> str:
    """This machine's architecture in Debian's words.

    Raises:
        SetupFailed: this is no Debian-like system.
    """
    for program in ("apt-get", "dpkg", "dpkg-deb"):
        if shutil.which(program) is None:
            raise SetupFailed(f"{program} is not installed: it needs Debian, Ubuntu or alike")
    return run_program(
        ["dpkg", "--print-architecture"], what="ask dpkg for the architecture", timeout_s=60
    ).strip()


def os_release() -> dict[str, str]:
    """What /etc/os-release says; empty where there is none."""
    try:
        lines = OS_RELEASE.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key: value.strip().strip("\"'") for key, _, value in pairs}


def machine_archive(folder: Path) -> Archive:
    """The archive of this machine's own release, as its apt has it.

    Args:
        folder: private; used where apt has no package lists yet, as in a new container.

    Raises:
        SetupFailed: apt knows no archive of a distribution whose keys are known.
    """
    found = _targets([])
    if not found:
        config = _write_config(folder, architecture=None)
        # A source of somebody else's that is out of reach fails this, and does not matter.
        with_its_own_lists = ["--config-file", str(config)]
        reason = ""
        try:
            run_program(
                ["apt-get", *with_its_own_lists, "--quiet=2", "update"],
                what="read the package lists",
                timeout_s=UPDATE_TIMEOUT_S,
            )
        except SetupFailed as error:
            reason = f" ({error})"
        found = _targets(with_its_own_lists)
        if not found:
            raise SetupFailed(f"apt has no package lists: run `apt-get update` first{reason}")
    facts = os_release()
    wanted = [facts.get(key, "") for key in ("VERSION_CODENAME", "UBUNTU_CODENAME")]
    known = [a for a in found if a.origin in KEYRINGS and "-" not in a.suite]
    own = [archive for archive in known if archive.suite in wanted]
    if not known:
        raise SetupFailed("apt uses no archive of Debian or Ubuntu to take arm64 packages from")
    return (own or known)[0]


def _targets(options: list[str]) -> list[Archive]:
    """The main archives whose lists apt has."""
    listed = run_program(
        [
            *("apt-get", *options, "indextargets", "--format"),
            "$(REPO_URI)\t$(CODENAME)\t$(ORIGIN)\t$(COMPONENT)",
            "Created-By: Packages",
        ],
        what="ask apt for its archives",
        timeout_s=60,
    )
    rows = [line.split("\t") for line in listed.splitlines()]
    return [
        Archive(uri=row[0], suite=row[1], origin=row[2], keyring=_keyring(row[2]))
        for row in rows
        if len(row) == 4 and row[3] == "main"
    ]


def _keyring(origin: str) -> Path | None:
    candidates = (KEYRING_FOLDER / name for name in KEYRINGS.get(origin, ()))
    return next((path for path in candidates if path.is_file()), None)


class PrivateApt:
    """apt with a state of its own in `folder`, for one architecture and one archive."""

    def __init__(self, folder: Path, *, architecture: str, archive: Archive) -> None:
        self._folder = folder
        signed = f" signed-by={archive.keyring}" if archive.keyring else ""
        source = f"deb [arch={architecture}{signed}] {archive.uri} {archive.suite} main\n"
        self._config = _write_config(folder, architecture=architecture, source=source)
        self._what = f"{architecture} packages of {archive.origin} {archive.suite}"

    def update(self) -> None:
        """Get the package list."""
        self._apt("update", what="list", timeout_s=UPDATE_TIMEOUT_S)

    def fetch(self, *names: str) -> list[Path]:
        """Download packages and all they need; what is here already is not loaded again."""
        self._apt(
            *("install", "--yes", "--no-install-recommends", "--download-only", *names),
            what="download",
            timeout_s=DOWNLOAD_TIMEOUT_S,
        )
        newest: dict[str, Path] = {}  # an attempt before an update of the archive left older ones
        for path in sorted((self._folder / "archives").glob("*.deb"), key=_changed):
            newest[path.name.partition("_")[0]] = path
        return list(newest.values())

    def fetch_alone(self, name: str) -> Path:
        """Download one package without what it needs."""
        folder = self._folder / "alone"
        folder.mkdir(exist_ok=True)
        self._apt("download", name, what="download", timeout_s=DOWNLOAD_TIMEOUT_S, cwd=folder)
        return max(folder.glob(f"{name}_*.deb"), key=_changed)

    def _apt(self, *arguments: str, what: str, timeout_s: float, cwd: Path | None = None) -> str:
        return run_program(
            ["apt-get", "--config-file", self._config, "--quiet=2", *arguments],
            what=f"{what} {self._what}",
            timeout_s=timeout_s,
            cwd=cwd,
        )


def _changed(path: Path) -> float:
    """When the archive got it: apt keeps the time of its server."""
    return path.stat().st_mtime


def _write_config(folder: Path, *, architecture: str | None, source: str | None = None) -> Path:
    """A configuration read after the machine's own, whose proxies stay in force.

    Args:
        folder: of the private state.
        architecture: None: the machine's.
        source: the only source; None: those of the machine.
    """
    if not str(folder).isprintable() or '"' in str(folder):
        raise SetupFailed(f"apt cannot work in a folder of this name: {folder}")
    for name in ("lists/partial", "archives/partial", "dpkg", "sources.d"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "dpkg" / "status").touch()  # nothing is installed there
    settings = {
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "dpkg" / "status",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "Dir::Log": folder,
        "APT::Update::Error-Mode": "any",  # out of reach is an error, not a warning
        "Acquire::Languages": "none",
        "Acquire::GzipIndexes": "true",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "30",
        "APT::Sandbox::User": "",
        "APT::Get::AllowUnauthenticated": "false",
    }
    if source is not None:
        (folder / "sources.list").write_text(source, encoding="utf-8")
        settings["Dir::Etc::sourcelist"] = folder / "sources.list"
        settings["Dir::Etc::sourceparts"] = folder / "sources.d"
        settings["Dir::Etc::preferences"] = folder / "no preferences"
        settings["Dir::Etc::preferencesparts"] = folder / "sources.d"
    # Hooks of the machine (containers delete every .deb, others need root) are not for here.
    hooks = [
        f"APT::Update::{hook}" for hook in ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
    ]
    hooks += [f"DPkg::{hook}" for hook in ("Pre-Invoke", "Post-Invoke", "Pre-Install-Pkgs")]
    lines = [f"#clear {hook};" for hook in hooks]
    lines += [f'{key} "{value}";' for key, value in settings.items()]
    if architecture is not None:
        lines.append("#clear APT::Architectures;")
        lines.append(f'APT::Architecture "{architecture}";')
        lines.append(f'APT::Architectures {{ "{architecture}"; }};')
    config = folder / "apt.conf"
    config.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return config
