"""A real ComfyUI server with this pack in it, started and ended by a `with` block."""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from .client import Client
from .environment import PAGES, ROOT
from .in_process import FOLDERS, device_flags

FOLDER = "lcm-lora"  # the pack's name in custom_nodes
STARTS_IN = 240  # seconds


class Server:
    """`base` is the server's own folder (models, outputs, log), kept from run to run.

    installed: the host has a copy of the pack, and all else that a server needs, in its own folder.
    python: of the environment that it runs in. pages: the folder of the front end, None for the
    one that the command was started with.
    Raises RuntimeError with the end of the log when the server does not come up.
    """

    def __init__(
        self, host: Path, local: Path, port: int = 0,
        *, installed: bool = False, python: Path = Path(sys.executable), pages: Path | None = None,
    ) -> None:  # fmt: skip
        self.host, self.installed, self.python = host, installed, python
        self.base = host if installed else local / f"server-{host.parent.name}"
        self.pages = str(pages or ("" if installed else os.environ.get(PAGES, "")))
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.base / "server.log"
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        if not self.installed:
            _link(ROOT, self.base / "custom_nodes" / FOLDER)
        command = [
            str(self.python), str(self.host / "main.py"), "--listen", "127.0.0.1",
            "--port", str(self.port), "--base-directory", str(self.base),
            "--disable-auto-launch", *device_flags(), *self._known_flags(),
            *(["--front-end-root", self.pages] if self.pages else []),
        ]  # fmt: skip
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.host, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=os.name != "nt",
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exc) -> None:
        self.stop()

    def client(self) -> Client:
        return Client(self.url, self.base / "output")

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Ends the server, gently first; nothing of it is left running."""
        if not self.alive():
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:  # a second Ctrl-C comes by here too
            if self.alive():
                self.kill()

    def kill(self) -> None:
        """Ends it at once, as a crash would."""
        if os.name == "nt":
            self._process.kill()
        else:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _known_flags(self) -> list[str]:
        """Flags that keep the server to itself, of those this version of the host knows."""
        text = (self.host / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        flags = ["--disable-api-nodes"] if "--disable-api-nodes" in text else []
        if "--database-url" in text:
            flags += ["--database-url", "sqlite:///:memory:"]
        return flags

    def _wait(self) -> None:
        until = time.monotonic() + STARTS_IN
        while time.monotonic() < until and self.alive():
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        why = "did not answer in time" if self.alive() else "ended at once"
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"The ComfyUI server {why}. The end of {self.log}:\n{tail}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _link(source: Path, target: Path) -> None:
    """target -> source; on Windows a junction, which needs no rights."""
    if target.is_symlink() and target.resolve() == source:
        return
    if target.is_symlink():
        target.unlink()
    if os.name == "nt":
        if not target.exists():
            import _winapi

            _winapi.CreateJunction(str(source), str(target))
        return
    target.symlink_to(source, target_is_directory=True)


def install(source: Path, folder: Path) -> None:
    """Puts a model file where the host looks for it, as a link where links can be.

    What another file of its name left there goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    if target.is_symlink():
        there = target.resolve() == source.resolve()
    else:
        there = target.is_file() and filecmp.cmp(source, target, shallow=False)
    if there:
        return
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)
