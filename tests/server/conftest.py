"""One real server with the pack and the toy in it, for all tests of this folder."""

from contextlib import contextmanager

import pytest
from lcm_lora.tests.server.ground import Ground, end_jobs
from lcm_lora.tests.server.pages import new_page


@pytest.fixture(scope="session")
def server(tmp_path_factory, host_folder):
    from lcm_lora.dev import in_process
    from lcm_lora.dev.server import Server
    from lcm_lora.dev.toy import assemble, stand_ins
    from lcm_lora.tests.server import flow_files
    from lcm_lora.training.jobs.store import Store

    local = tmp_path_factory.mktemp("server")
    in_process.enter(host_folder, local / "in-process")
    running = Server(host_folder, local)
    assemble.install(running.base)
    stand_ins.lay_out(running.base)
    flow_files.names(running.base)
    with running:
        yield running
        end_jobs(Store(running.base / "user" / "__lcm_lora" / "jobs"))


@pytest.fixture(scope="session")
def client(server):
    return server.client()


@pytest.fixture(scope="session")
def subject(server):
    """The toy's files and captions, as the demo puts them into the shipped workflows."""
    from lcm_lora.dev.demo import toy_subject

    return toy_subject()


@contextmanager
def _grounded(host_folder, folder, subject, server):
    made = Ground(host_folder, folder, subject, server.base / "models")
    made.up()
    yield made
    made.end_jobs()
    made.server.stop()


@pytest.fixture
def ground(host_folder, tmp_path, server, subject):
    with _grounded(host_folder, tmp_path, subject, server) as made:
        yield made


@pytest.fixture(scope="module")
def shared_ground(host_folder, tmp_path_factory, server, subject):
    """One for all tests of a file, each of which begins without jobs: see Ground.clear."""
    with _grounded(host_folder, tmp_path_factory.mktemp("ground"), subject, server) as made:
        yield made


@pytest.fixture(scope="module")
def browser():
    """Chromium for the tests of one file. While it runs, no other event loop can run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from lcm_lora.tests.server.browser import chromium

    if (executable := chromium()) is None:
        pytest.skip("there is no Chromium here, and only root can install Debian's")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=executable, headless=True,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )  # fmt: skip
        yield browser
        browser.close()


@pytest.fixture
def page_in(browser, client):
    """page_in(language) -> a page of the server; nothing may go wrong on it, and it may ask nobody
    else for anything."""
    made = []

    def opened(language: str):
        client.post("/settings", {"Comfy.Locale": language})
        made.append(new_page(browser, client))
        return made[-1]

    yield opened
    client.post("/settings", {"Comfy.Locale": "en"})
    for page in made:
        assert not page.wrong
        assert not page.foreign
        page.context.close()


@pytest.fixture
def page(page_in):
    return page_in("en")
