"""Fills .device/ with the files that a GPU machine without network needs besides a checkout.

That is ComfyUI's source and the wheels that wheels.txt names. `python3 dev/gpu/pack.py` needs the
network and the standard library only.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import environment

KIT, OUT = Path(__file__).resolve().parent, environment.ROOT / ".device"
LIMIT = 64 * 2**20  # bytes of .device and of the checkout's files together
LEFT_OUT = {
    "blueprints", "comfy_api_nodes", "tests", "tests-unit", "models", "script_examples", "input",
    "output", "custom_nodes", ".github", ".ci",
}  # fmt: skip
ENDINGS = {".md", ".pyc", ".png", ".jpg", ".webp", ".example"}
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
OLD = ("manylinux2014",)


def main() -> int:
    OUT.mkdir(exist_ok=True)
    environment.cache().mkdir(parents=True, exist_ok=True)
    with environment._lock(environment.cache() / "lock"):
        host = environment._host(environment.PRIMARY)
    with tarfile.open(OUT / "ComfyUI.tar.xz", "w:xz") as archive:
        for path in sorted(host.rglob("*")):
            if path.is_file() and is_needed(path.relative_to(host)):
                name = f"ComfyUI/{path.relative_to(host).as_posix()}"
                archive.add(path, name, filter=without_owner)
    for wheel in (OUT / "wheels").glob("*.whl"):
        wheel.unlink()
    named = (KIT / "wheels.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in named if line and line[0] != "#"]
    own = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    aimdo, kitchen = (
        next(line for line in own if line.startswith(f"comfy-{name}"))
        for name in ("aimdo", "kitchen")
    )
    fetch(PLATFORMS, [*wanted, aimdo])
    # For an old platform there is only the wheel without 45 MB of CUDA kernels, which SD and SDXL
    # in half precision do not call.
    fetch(OLD, [kitchen])
    carried = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    tracked = sum(path.stat().st_size for path in checkout() if path.is_file())
    size = f"{carried / 2**20:.1f} MiB in .device, {tracked / 2**20:.1f} MiB in the checkout"
    environment._say(f"{size}, at most {LIMIT / 2**20:.0f} MiB in all")
    return 0 if carried + tracked < LIMIT else 1


def is_needed(path: Path) -> bool:
    """Whether sampling, distillation or a test reads this file of ComfyUI's."""
    if path.parts[0] in LEFT_OUT or "__pycache__" in path.parts or path.suffix in ENDINGS:
        return False
    encoders = path.parts[:2] == ("comfy", "text_encoders")
    return not encoders or path.suffix == ".py" or path.parts[2].startswith(("sd", "clip"))


def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def fetch(platforms: tuple[str, ...], packages: list[str]) -> None:
    words = [word for name in platforms for word in ("--platform", f"{name}_x86_64")]
    with tempfile.TemporaryDirectory() as scratch:
        pip = environment._pip(Path(scratch))
        environment._step(
            f"Fetching {len(packages)} wheels",
            [*pip, "download", "-q", "--disable-pip-version-check", "--no-deps",
             "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp",
             "-d", str(OUT / "wheels"), *words, *packages],
        )  # fmt: skip


def checkout() -> list[Path]:
    """The files of the checkout that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=environment.ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [environment.ROOT / name for name in listed.stdout.split("\0") if name]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except environment.SetupError as error:
        sys.exit(str(error))
