"""The checkout as the package `lcm_lora`, as the developer's commands register it."""

import os
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

if "lcm_lora" not in sys.modules:
    package = types.ModuleType("lcm_lora")
    package.__path__ = [str(ROOT)]
    sys.modules["lcm_lora"] = package


def pytest_collection_modifyitems(config, items):
    import torch

    together(items)
    if config.getoption("markexpr") != "faults":
        for item in items:
            if item.get_closest_marker("faults"):
                reason = "takes minutes: run it with `python3 dev faults`"
                item.add_marker(pytest.mark.skip(reason=reason))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


JOBS = ("server/test_distill", "server/test_faults", "server/test_jobs", "server/test_page",
        "server/test_tab", "host/test_jobs", "host/test_ray")  # fmt: skip
FIRST = ("jobs", "server")


def together(items) -> None:
    """Which tests run in one process: those of one file; all that queue jobs, because a device
    takes one at a time; and all others that need a server. Those two start first because they take
    longest."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        group = "jobs" if file.startswith(JOBS) else file.partition("/")[0]
        item.add_marker(pytest.mark.xdist_group(group if group in FIRST else file))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] not in FIRST)


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="record new nodes and inputs as landed"
    )
    parser.addoption("--times", type=int, default=1, help="of each fault at random moments")
    parser.addoption("--json", type=Path, help="where the table of faults goes")


@pytest.fixture(scope="session")
def tally(request, pytestconfig):
    """The table of faults, written and printed when all is over."""
    from lcm_lora.tests.tally import Tally

    made = Tally(pytestconfig.getoption("--times"))
    yield made
    if made.rows and (path := pytestconfig.getoption("--json")):
        table = made.write(path)
        capture = pytestconfig.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print("\n" + table)  # noqa: T201 (it is asked for)


@pytest.fixture(scope="session")
def host_folder() -> Path:
    """The ComfyUI that `python3 dev test` brings."""
    host = os.environ.get("LCM_LORA_TEST_HOST")
    if not host:
        pytest.fail("no ComfyUI: run the tests with `python3 dev test`, which brings one")
    return Path(host)


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> None:
    """Skips what has to fetch packages where none can be fetched, and says so."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "--retries", "0", "--timeout", "20", "download", "-q",
         "--no-deps", "--no-cache-dir", "--dest", tmp_path_factory.mktemp("network"), "six"],
        capture_output=True, text=True,
    )  # fmt: skip
    if asked.returncode:
        pytest.skip(f"packages cannot be fetched here: {asked.stderr.strip().splitlines()[-1]}")


@pytest.fixture
def small_files():
    """small_files(limit) -> a context in which writing a file beyond so many bytes fails."""
    resource = pytest.importorskip("resource", reason="only POSIX limits a file's size")
    import signal

    @contextmanager
    def limited(limit: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited
