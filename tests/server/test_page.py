"""The tab "LCM-LoRA jobs" in the real front end, in Chromium: a job's whole life on the page."""

import re
import time
from pathlib import Path

import pytest
from lcm_lora.tests.server.pages import QUEUED, TEMPLATES, new_page, open_template, opened, pictured

LIGHTNESS = """() => {
    const panel = document.querySelector('.lcm-panel');
    const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3)
        .reduce((sum, value) => sum + Number(value), 0);
    let ground = panel, colour;
    do {
        colour = getComputedStyle(ground).backgroundColor;
        ground = ground.parentElement;
    } while (ground && /, 0\\)|transparent/.test(colour));
    return [light(getComputedStyle(panel).color), light(colour)];
}"""


def show_tab(page) -> None:
    if not page.locator(".lcm-panel").is_visible():
        page.evaluate("app.extensionManager.command.execute('lcm_lora.jobs')")
    page.wait_for_selector(".lcm-panel", timeout=20_000)


def distil(page, subject, name, steps) -> None:
    """Opens the shipped workflow, fits it to the toy, and queues it."""
    open_template(page, subject, "Distil an LCM-LoRA")
    page.evaluate(
        """([checkpoint, name, steps]) => {
            const set = (type, values) => {
                const node = app.graph.nodes.find((node) => node.type === type);
                for (const [key, value] of Object.entries(values)) {
                    node.widgets.find((widget) => widget.name === key).value = value;
                }
            };
            set('LCMDistillData', {'source.prompts': 'a photo of a bag', 'source.count': 4,
                'source.draw_steps': 2, resolution: 64, auto_resolution: false});
            set('LCMDistill', {checkpoint, name, length: 'custom', steps, batch: 2, rank: 4,
                guidance: 2.5, lr: 0.001, checkpoint_every: 10, sample_every: steps,
                policy: 'share'});
        }""",
        [subject.checkpoint, name, steps],
    )
    assert page.evaluate(f"async () => {QUEUED}")


def job(page, name):
    return page.locator(".lcm-jobs > li", has=page.locator(".lcm-name", has_text=name))


def reaches(page, name, state, seconds=300) -> None:
    row = job(page, name)
    deadline = time.monotonic() + seconds
    while row.count() == 0 or row.get_attribute("data-state") != state:
        assert time.monotonic() < deadline, f"{name} did not become {state}"
        page.wait_for_timeout(200)


def test_from_the_workflow_to_a_picture(page, client, subject):
    distil(page, subject, "page/first", 24)
    show_tab(page)
    reaches(page, "page/first", "running")
    job(page, "page/first").locator(".lcm-head").click()
    page.wait_for_selector(".lcm-chart svg polyline", timeout=120_000)
    pictured(page, "running")

    opened(page, client)  # reloaded in the middle
    show_tab(page)
    reaches(page, "page/first", "done")
    row = job(page, "page/first")
    if row.locator(".lcm-head").get_attribute("aria-expanded") == "false":
        row.locator(".lcm-head").click()
    page.wait_for_selector(".lcm-samples img[src*='step-00000024']")
    page.wait_for_function(
        "document.querySelector('.lcm-samples img').naturalWidth > 0", timeout=10_000
    )
    pictured(page, "done")

    open_template(page, subject, "1 Text to image (SD1.5)")
    row.locator('[data-action="use in graph"]').click()
    page.wait_for_function(
        "app.graph.nodes.find((node) => node.type === 'LCMLoRALoader').widgets[0].value"
        " === 'page/first.safetensors'"
    )
    drawn = page.evaluate(
        """async (checkpoint) => {
            const [made] = app.graph.nodes.filter((node) => node.type === 'LCMLoRALoader');
            const load = app.graph.nodes.find((node) => node.type === 'CheckpointLoaderSimple');
            load.widgets[0].value = checkpoint;
            const size = app.graph.nodes.find((node) => node.type === 'EmptyLatentImage');
            size.widgets[0].value = size.widgets[1].value = 64;
            const ended = new Promise((resolve) => {
                app.api.addEventListener('execution_success', () => resolve('drawn'));
                app.api.addEventListener('execution_error', () => resolve('failed'));
            });
            if (!QUEUED) return JSON.stringify(app.lastNodeErrors);
            return [made.widgets[0].value, await ended].join(' ');
        }""".replace("QUEUED", QUEUED),
        subject.checkpoint,
    )
    assert drawn == "page/first.safetensors drawn"
    pictured(page, "used")


@pytest.mark.faults
def test_pause_resume_stop_and_delete_by_keyboard(page, subject):
    distil(page, subject, "page keys", 5000)
    show_tab(page)
    reaches(page, "page keys", "running")

    def press(action):
        button = job(page, "page keys").locator(f'[data-action="{action}"]')
        button.wait_for()
        button.focus()
        page.keyboard.press("Enter")

    press("pause")
    reaches(page, "page keys", "paused")
    press("resume")
    reaches(page, "page keys", "running")
    press("stop")
    reaches(page, "page keys", "paused")
    press("delete")
    # The button's name asks too, so that screen readers read the question.
    job(page, "page keys").get_by_role("button", name="really delete?: page keys").wait_for()
    press("delete")
    page.wait_for_function(
        "![...document.querySelectorAll('.lcm-name')].some((e) => e.textContent === 'page keys')"
    )


@pytest.mark.faults
def test_the_page_goes_on_after_a_restart_of_the_server(browser, ground):
    page = new_page(browser, ground.server.client())
    try:
        show_tab(page)
        ground.order("page/restarted", steps=60)
        reaches(page, "page/restarted", "running")
        ground.kill("server", "")
        page.wait_for_function(
            "document.querySelector('.lcm-note').textContent.length > 0", timeout=30_000
        )
        ground.up(ground.server.port)
        reaches(page, "page/restarted", "done")
        assert page.locator(".lcm-note").inner_text() == ""
        assert not page.foreign
    finally:
        page.context.close()


def test_it_fits_in_both_themes_and_on_a_phone(page):
    for theme in ("dark", "light"):
        page.evaluate(f"app.extensionManager.setting.set('Comfy.ColorPalette', '{theme}')")
        for width, height in ((1600, 900), (390, 844)):
            page.set_viewport_size({"width": width, "height": height})
            show_tab(page)
            page.wait_for_timeout(500)
            pictured(page, f"{theme}-{width}")
            wide = page.evaluate("""() => {
                const panel = document.querySelector('.lcm-panel');
                return panel.scrollWidth - panel.clientWidth;
            }""")
            assert wide <= 0, f"{theme}, {width}: the page is too wide for its tab"
            words, ground = page.evaluate(LIGHTNESS)
            assert abs(words - ground) > 300, f"{theme}: words are hardly visible on the ground"


@pytest.mark.parametrize("language", ["en", "fr", "ja", "ko", "zh"])  # fr has no page
def test_a_nodes_help_is_one_click_away(page_in, language):
    docs = Path(__file__).resolve().parents[2] / "web" / "docs"
    own = docs / "LCMKSampler" / f"{language}.md"
    text = (own if own.is_file() else docs / "LCMKSampler.md").read_text(encoding="utf-8")
    page = page_in(language)
    page.evaluate("""() => {
        app.graph.clear();
        const sampler = LiteGraph.createNode('LCMKSampler');
        sampler.pos = [500, 300];
        app.graph.add(sampler);
        app.canvas.selectNode(sampler);
    }""")
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name=re.findall("^## (.+)$", text, re.M)[-1]).wait_for()
    pictured(page, f"help-{language}")
    picture = page.locator("img[src$='docs/LCMKSampler.jpg']")
    assert picture.evaluate("async (image) => (await image.decode(), image.naturalWidth)") > 0


def test_it_speaks_the_language_of_the_front_end(page_in):
    page = page_in("ko")
    page.evaluate(
        f"""async () => {{
            const answer = await fetch('{TEMPLATES}/Distil an LCM-LoRA.json');
            await app.loadGraphData(await answer.json(), true, true, 'korean');
        }}"""
    )
    show_tab(page)
    pictured(page, "korean")
    assert page.locator(".lcm-panel h2").inner_text() == "LCM-LoRA 작업"
    node = """app.graph.nodes.find((node) => node.type === 'LCMDistillData')"""
    assert page.evaluate(f"{node}.constructor.title") == "증류 데이터"
    labels = page.evaluate(f"{node}.widgets.map((widget) => widget.label)")
    assert {"출처", "프롬프트", "이미지 수"} <= set(labels)
