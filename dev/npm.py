"""npm packages that developers need, fetched into the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def fetched(package: str, digest: str, folder: Path) -> Path:
    """The archive of an npm package in `folder`, fetched by npm if it is not there.

    Raises RuntimeError when it cannot be had, or has another sha256 than `digest`.
    """
    path = folder / f"{digest[:16]}.tgz"
    if path.exists():
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"{package} is fetched with npm, and npm is not installed.")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = subprocess.run(
            [npm, "pack", package, "--silent"], cwd=scratch, capture_output=True, text=True
        )
        archives = list(Path(scratch).glob("*.tgz"))
        if made.returncode or len(archives) != 1:
            raise RuntimeError(
                f"npm could not fetch {package}: {made.stderr.strip()[-300:]} Check the network "
                "and run it again."
            )
        actual = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if actual != digest:
            raise RuntimeError(
                f"{package} has the sha256 {actual}, expected {digest}. Nothing of it was used."
            )
        os.replace(archives[0], path)
    return path
