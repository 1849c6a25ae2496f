"""The project's tests on the device: those marked gpu first, then all that have the host in their
process, spread over the cores. Results are read off the lines as they come."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

from ..environment import ROOT
from .kit import Kit

log = logging.getLogger("lcm_lora")
TESTS = ROOT / "tests"
# A device takes the jobs of the queue one at a time, so they would take minutes. Ray is not there.
LEFT_OUT = ("test_ray.py", "test_jobs.py", "test_gpu_kit.py")
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED"
LINE = re.compile(rf"(?:^|\s)({OUTCOMES})\s+(?:\[ *\d+%\]\s+)?(tests\S+|\S+::\S+)")
PLAIN = re.compile(rf"^(\S+::.*?) ({OUTCOMES})")


def run(kit: Kit) -> None:
    from ..toy import assemble

    assemble.checkpoint()  # once, before the processes that share it
    pytest = [
        sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir",
        str(TESTS), "--confcutdir", str(TESTS), "-v",
    ]  # fmt: skip
    if importlib.util.find_spec("pytest_timeout"):
        pytest += ["--timeout", "150"]
    files = [str(p) for p in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in p.read_text("utf-8")]
    phase(kit, "marked gpu", [*pytest, "-m", "gpu", *files], min(30, kit.left() * 0.4))
    left_out = [word for name in LEFT_OUT for word in ("--ignore", str(TESTS / "host" / name))]
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    chosen = TESTS / "host"
    if kit.tiny:  # enough to prove the path
        chosen, workers = chosen / "test_sampling_schedule.py", 1
    spread = [*pytest, "-n", str(workers), "--dist", "load", *left_out, str(chosen)]
    phase(kit, "host tests", spread, kit.left() - 11)


def phase(kit: Kit, case: str, command: list[str], seconds: float) -> None:
    if seconds < 5:
        kit.note(f"{case}: left out, {seconds:.0f} s are left")
        return
    begun = time.monotonic()
    file = kit.work / f"{case.replace(' ', '-')}.txt"
    environment = {"LCM_LORA_TEST_HOST": str(kit.host), "OMP_NUM_THREADS": "1"}
    with open(file, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )  # fmt: skip
        try:
            state = f"status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            state = f"ended after its {seconds:.0f} s"
            process.send_signal(signal.SIGINT)  # it then says why tests have failed so far
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
    text = file.read_text(errors="replace")
    log.info("%s", text[-30000:])
    outcomes: dict[str, str] = {}
    for line in text.splitlines():
        if match := PLAIN.match(line):
            outcomes[match[1]] = match[2]
        elif match := LINE.search(line):
            outcomes[match[2]] = match[1]
    counts = Counter(outcomes.values())
    for outcome in OUTCOMES.split("|"):
        kit.add("pytest", case, outcome.lower(), "tests", counts[outcome])
    kit.add("pytest", case, "time", "s", time.monotonic() - begun)
    kit.note(f"{case}: {state}; {text.strip().splitlines()[-1] if text.strip() else 'no output'}")
    bad = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    for name in bad[:40]:
        kit.note(f"{case}: {name} {outcomes[name].lower()}: {why(text, name)}")
    kit.bar(f"{case}: failed tests", len(bad), 0)


def why(text: str, name: str) -> str:
    """What pytest's summary says of a test; empty if it was ended before."""
    for line in text.splitlines():
        if line.startswith(("FAILED ", "ERROR ")) and name in line:
            return line.partition(" - ")[2][:300]
    return ""
