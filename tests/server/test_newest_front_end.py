"""The newest front end on the newest host: users update it apart from ComfyUI. A few cheap tests on
a server of its own; `--front-end` runs all of them with it."""

import os

import pytest
from lcm_lora.dev import environment
from lcm_lora.tests.server import test_page, test_templates, test_texts
from lcm_lora.tests.server.pages import new_page


@pytest.fixture(scope="module")
def client(server, host_folder, tmp_path_factory):
    """Of a server with the newest front end, in place of the usual one."""
    from lcm_lora.dev.server import Server
    from lcm_lora.dev.toy import assemble, stand_ins

    if os.environ.get(environment.PAGES) or environment.PRIMARY not in host_folder.parent.name:
        pytest.skip("this run is about another host or front end")
    pages = environment.front_end(environment.NEWEST_FRONT_END)
    running = Server(host_folder, tmp_path_factory.mktemp("newest"), pages=pages)
    assemble.install(running.base)
    stand_ins.lay_out(running.base)
    with running:
        yield running.client()


@pytest.fixture(scope="module")
def page(browser, client):
    made = new_page(browser, client)
    yield made
    assert not made.wrong and not made.foreign
    made.context.close()


def test_it_is_the_newest(page):
    assert page.evaluate("window.__COMFYUI_FRONTEND_VERSION__") == environment.NEWEST_FRONT_END


@pytest.mark.parametrize("path", test_templates.WORKFLOWS, ids=lambda path: path.stem)
def test_every_template_opens(page, subject, path):
    test_templates.test_it_opens_without_a_warning_and_gives_the_prompt_that_we_run(
        page, subject, path, vue=True
    )


workflow = test_texts.workflow


def test_texts_stay_fit_and_are_saved(page, workflow):
    test_texts.test_they_stay_fit_and_are_saved(page, workflow, vue=True)


def test_the_tab_fits_in_both_themes_and_on_a_phone(page):
    test_page.test_it_fits_in_both_themes_and_on_a_phone(page)
