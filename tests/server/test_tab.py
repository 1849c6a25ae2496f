"""What the tab "LCM-LoRA jobs" shows of finished jobs: charts, sample pictures, actions; and that
it keeps the focus while jobs change."""

import csv
import re

import pytest
from lcm_lora.tests.server.axe import violations
from lcm_lora.tests.server.ended import lay
from lcm_lora.tests.server.pages import new_page, open_template, pictured
from lcm_lora.tests.server.test_page import job, reaches, show_tab


@pytest.fixture
def ground(shared_ground):
    yield shared_ground
    shared_ground.clear()


@pytest.fixture
def tab(browser, ground):
    """A page with the tab open, which shows two finished jobs."""
    lay(ground, "old/plain", scale=0.5)
    lay(ground, "new/other", steps=400)
    page = new_page(browser, ground.server.client())
    show_tab(page)
    reaches(page, "new/other", "done")
    yield page
    assert not page.wrong
    assert not page.foreign
    page.context.close()


def opened_row(page, name):
    row = job(page, name)
    row.locator(".lcm-head").click()
    row.locator(".lcm-chart svg polyline").first.wait_for()
    return row


def themes(page, name):
    """Keeps a screenshot in each theme."""
    for theme in ("light", "dark"):
        page.evaluate(f"app.extensionManager.setting.set('Comfy.ColorPalette', '{theme}')")
        page.wait_for_timeout(500)
        pictured(page, f"{name}-{theme}")


def test_charts_tell_their_values(tab):
    row = opened_row(tab, "new/other")
    chart = row.get_by_role("slider", name="loss")
    assert chart.get_attribute("aria-valuetext") == "step 400: loss 0.0255"
    # Round numbers on both axes: 10 to 400 steps, and a loss from 0.0255 to 0.291.
    labels = chart.locator("text").all_text_contents()
    assert labels == ["0.05", "0.1", "0.2", "100", "200", "300", "400"]

    chart.focus()
    for key in ("Home", "ArrowRight"):
        tab.keyboard.press(key)
    assert chart.get_attribute("aria-valuetext") == "step 20: loss 0.266"
    assert row.locator(".lcm-readout").first.inner_text() == "step 20: loss 0.266"
    assert chart.locator("circle").count() == 1
    chart.hover()  # the middle of the picture
    middle = chart.get_attribute("aria-valuenow")
    assert 150 < int(middle) < 300

    row.get_by_label("compare with").select_option(label="old/plain")
    tab.wait_for_function("document.querySelectorAll('.lcm-chart .lcm-dashed').length > 0")
    tab.mouse.move(1500, 800)
    assert chart.get_attribute("aria-valuetext") == "step 400: loss 0.0255, old/plain: loss 0.0303"
    row.get_by_label("smoothing").fill("90")
    assert row.get_by_label("smoothing").get_attribute("aria-valuetext") == "90%"
    smoothed = float(chart.get_attribute("aria-valuetext").split()[3].strip(","))
    assert smoothed > 0.0255  # the mean of what fell
    themes(tab, "charts")


ROW = """async (changes) => {
    const { Row } = await import('/extensions/lcm-lora/row.mjs');
    const job = { id: 'x', name: 'a', title: '', state: 'preparing', step: 0, steps: 200 };
    const row = new Row({}, () => {}, () => {});
    row.update({ created: 1, ...job, ...changes }, [], false);
    return [row.bar.value, row.bar.max, row.bar.getAttribute('aria-label'), row.line.textContent];
}"""


def test_the_bar_shows_the_bank_and_then_the_steps(tab):
    bank = {"activity": "making latents", "activity_done": 30, "activity_total": 250}
    value, most, label, _ = tab.evaluate(ROW, bank)
    assert (value, most, label) == (30, 250, "a: making latents 30 of 250")
    samples = {"activity": "drawing samples", "activity_done": 3, "activity_total": 8, "step": 40}
    value, most, label, _ = tab.evaluate(ROW, samples | {"state": "running"})
    assert (value, most, label) == (40, 200, "a: step 40 of 200")
    early = {"state": "done", "step": 40, "lora_name": "a.safetensors"}
    value, most, _, line = tab.evaluate(ROW, early)
    assert value == most
    assert line == "finished early: step 40 of 200 · Finished: a.safetensors"


def test_a_single_figure_is_a_dot(tab, ground):
    lay(ground, "short/one", steps=10, every=10)
    reaches(tab, "short/one", "done")
    row = job(tab, "short/one")
    assert "Finished: short/one.safetensors" in row.locator(".lcm-line").inner_text()
    row.locator(".lcm-head").click()
    loss = row.get_by_role("slider", name="loss")
    loss.wait_for()
    assert loss.get_attribute("aria-valuetext") == "step 10: loss 0.291"
    assert loss.locator("circle").count() == 1 and not loss.locator("polyline").count()
    for name in ("distance to the teacher", "distance to the data", "recall"):
        assert row.get_by_role("slider", name=name).locator("circle").count() == 3
    loss.hover()
    pictured(tab, "chart-of-one")


def test_figures_come_as_a_file(tab):
    row = opened_row(tab, "new/other")
    with tab.expect_download() as started:
        row.get_by_role("button", name="download CSV").click()
    assert started.value.suggested_filename == "new-other.csv"
    with open(started.value.path(), newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == list(range(10, 401, 10))
    at_50 = next(line for line in lines if line["step"] == "50")
    assert float(at_50["distance_2_steps"]) == pytest.approx(float(at_50["loss"]) / 2)
    assert at_50["distance_to_data_2_steps"] == at_50["distance_2_steps"]
    assert float(at_50["recall_4_steps"]) == pytest.approx(0.9 - float(at_50["loss"]))
    assert lines[0]["distance_1_step"] == lines[0]["recall_4_steps"] == ""
    assert float(lines[0]["lr"]) == 1e-3


def test_sample_pictures_open_large_and_close_by_keyboard(tab):
    row = opened_row(tab, "new/other")
    slider = row.get_by_label("sample pictures over time").first
    slider.fill("2")
    assert slider.get_attribute("aria-valuetext") == "after step 150"
    picture = row.get_by_role("button", name="enlarge the sample pictures after step 150")
    picture.focus()
    tab.keyboard.press("Enter")
    viewer = tab.get_by_role("dialog", name="sample pictures")
    viewer.locator("canvas").first.wait_for()
    assert viewer.locator("h4").all_inner_texts() == ["a bag", "a dress"]
    shown = viewer.locator("section").first.locator("figcaption").all_inner_texts()
    steps = ("1 step", "2 steps", "4 steps")
    both = [f"{n}, after step {step}" for n in steps for step in (50, 150)]
    assert shown == ["teacher", *both]
    # Each picture is its part of its own sheet; the sheets' red tells their steps.
    red = """(canvas) => [canvas.width, canvas.getContext('2d').getImageData(9, 9, 1, 1).data[0]]"""
    pictures = viewer.locator("section").first.locator("canvas").all()
    assert [each.evaluate(red) for each in pictures[1:3]] == [[64, 50], [64, 150]]
    themes(tab, "samples")
    viewer.get_by_role("checkbox").uncheck()
    viewer.get_by_label("sample pictures over time").fill("3")
    tab.wait_for_function("document.querySelectorAll('.lcm-viewer canvas').length === 8")
    tab.keyboard.press("Escape")
    assert not viewer.is_visible()
    assert tab.evaluate("document.activeElement.className") == "lcm-open"


TEXT_TO_IMAGE = "1 Text to image (SD1.5)"


LOADERS = """() => app.graph.nodes.filter(({ type }) => type === 'LCMLoRALoader').map((node) => [
    node.widgets.find(({ name }) => name === 'lora_name').value,
    node.getInputNode(0)?.type ?? null,
])"""
OVERLAPS = """() => {
    const boxes = app.graph.nodes.map((node) => node.boundingRect ?? node.getBounding());
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => a[0] < b[0] + b[2]
        && b[0] < a[0] + a[2] && a[1] < b[1] + b[3] && b[1] < a[1] + a[3])).length;
}"""


def test_use_in_graph_sets_the_loader_or_places_one_beside_the_others(tab, subject):
    open_template(tab, subject, TEXT_TO_IMAGE)
    row = job(tab, "new/other")

    def used(*expected):
        """Whether the loaders are the expected ones after a press."""
        row.get_by_role("button", name="use in graph").click()
        for _ in range(60):
            tab.wait_for_timeout(500)
            if (now := sorted(tab.evaluate(LOADERS), key=str)) == list(expected):
                return True
        raise AssertionError(now)

    name, source = "new/other.safetensors", "CheckpointLoaderSimple"
    assert used([name, source])  # the only one
    tab.evaluate(
        """() => {
            const [loader] = app.graph.nodes.filter(({ type }) => type === 'LCMLoRALoader');
            loader.widgets[0].value = 'kept.safetensors';
            const other = LiteGraph.createNode('LCMLoRALoader');
            other.pos = [loader.pos[0], loader.pos[1] - 500];
            app.graph.add(other);
            other.widgets[0].value = 'another.safetensors';
            app.canvas.selectItems([other]);
        }"""
    )
    assert used(["kept.safetensors", source], [name, None])  # the selected one
    tab.evaluate("app.canvas.deselectAll()")
    # A new one, connected to the checkpoint.
    assert used(["kept.safetensors", source], [name, source], [name, None])
    tab.evaluate(
        "app.graph.nodes.filter(({ type }) => type === 'LCMLoRALoader')"
        ".forEach((node) => app.graph.remove(node))"
    )
    assert used([name, source])
    assert tab.evaluate(OVERLAPS) == 0
    pictured(tab, "used-in-graph")


def test_a_jobs_settings_come_back_into_the_graph(tab, ground, subject):
    pictures = ground.base / "input" / "pictures"
    pictures.mkdir(parents=True)
    data = {"kind": "pictures", "path": "pictures", "crops": 3, "flip": False, "resolution": 128}
    data |= {"auto_resolution": True}
    chosen = {"steps": 777, "rank": 8, "objective": "phased", "length": "try"}
    chosen |= {"sample_prompts": "a red cup\na blue cat"}
    ground.order("edit/me", **chosen, data=data)
    open_template(tab, subject, TEXT_TO_IMAGE)
    row = job(tab, "edit/me")
    row.locator(".lcm-head").click()
    row.get_by_role("button", name="clone and edit").click()
    tab.wait_for_function("app.graph.nodes.some(({ type }) => type === 'LCMDistill')")
    tab.wait_for_timeout(1500)
    values = tab.evaluate(
        """() => {
            const made = app.graph.nodes.filter(({ type }) => type.startsWith('LCMDistill'));
            const widgets = made.flatMap(({ widgets }) => widgets);
            return Object.fromEntries(widgets.map(({ name, value }) => [name, value]));
        }"""
    )
    assert {
        "source": "pictures", "source.folder": "pictures", "source.crops": 3, "source.flip": False,
        "resolution": 128, "auto_resolution": True, "name": "edit/me-2", **chosen,
        "style_lora": "none", "checkpoint": ground.subject.checkpoint,
    }.items() <= values.items()  # fmt: skip
    assert tab.evaluate(OVERLAPS) == 0
    pictured(tab, "edited")


def test_jobs_are_found_renamed_and_cleared(tab, ground):
    def names():
        return tab.locator(".lcm-jobs .lcm-name").all_inner_texts()

    row = opened_row(tab, "old/plain")
    row.get_by_label("name", exact=True).fill("The plain one")
    tab.keyboard.press("Enter")
    tab.wait_for_function(
        "[...document.querySelectorAll('.lcm-name')].some((e) => e.textContent === 'The plain one')"
    )
    search = tab.get_by_role("searchbox", name="filter by name or state")
    search.fill("plain")
    assert names() == ["The plain one"]
    assert tab.locator(".lcm-note").inner_text() == "1 of 2 are shown."
    clear = tab.locator(".lcm-panel").get_by_role("button", name="clear finished jobs")
    clear.click()
    tab.get_by_role("button", name="really delete the finished jobs (1)? Their LoRAs stay.").click()
    tab.wait_for_function("!document.querySelector('.lcm-jobs .lcm-name')")
    assert clear.count() == 1, "a button that was answered has its own words again"
    search.fill("")
    assert names() == ["new/other"]
    assert (ground.loras / "old" / "plain.safetensors").is_file()

    clear.click()
    tab.get_by_role("button", name="really delete the finished jobs (1)? Their LoRAs stay.").click()
    template = tab.get_by_role("button", name="open the distillation template")
    template.wait_for()
    pictured(tab, "empty")
    template.click()
    tab.wait_for_function("app.graph.nodes.some(({ type }) => type === 'LCMDistill')")


def test_nothing_in_the_tab_keeps_anyone_out(tab):
    row = opened_row(tab, "new/other")
    row.get_by_label("compare with").select_option(label="old/plain")
    for theme in ("light", "dark"):
        tab.evaluate(f"app.extensionManager.setting.set('Comfy.ColorPalette', '{theme}')")
        tab.wait_for_timeout(500)
        assert violations(tab, ".lcm-panel") == [], theme
        row.locator(".lcm-open").click()
        tab.locator(".lcm-viewer canvas").first.wait_for()
        assert violations(tab, ".lcm-viewer") == [], theme
        tab.keyboard.press("Escape")


def test_the_keyboard_alone_opens_the_tab_and_deletes_a_job(browser, ground):
    lay(ground, "by/keys")
    page = new_page(browser, ground.server.client())

    def reached(label):
        """Presses Tab until what has the focus is called so, and then Enter."""
        for _ in range(150):
            page.keyboard.press("Tab")
            named = """(words) => {
                const { activeElement: now } = document;
                const name = now.getAttribute('aria-label') ?? now.textContent;
                return name.trim().startsWith(words);
            }"""
            if page.evaluate(named, label):
                page.keyboard.press("Enter")
                return
        raise AssertionError(f"Tab never came to {label}")

    try:
        reached("LCM-LoRA jobs")
        reaches(page, "by/keys", "done")
        reached("by/keys")
        page.locator(".lcm-chart svg polyline").first.wait_for()
        reached("delete")
        page.wait_for_timeout(300)
        page.keyboard.press("Enter")
        page.wait_for_function("!document.querySelector('.lcm-jobs .lcm-name')")
        assert page.evaluate("document.activeElement.closest('.lcm-panel') !== null")
        assert not page.wrong
    finally:
        page.context.close()


def test_the_browser_notifies_of_a_jobs_end_if_that_is_wanted(tab, ground):
    tab.context.grant_permissions(["notifications"], origin=ground.server.url)
    tab.evaluate(
        """() => {
            window.shown = [];
            const Real = window.Notification;
            window.Notification = new Proxy(Real, {
                construct(target, [title, options]) {
                    shown.push(`${title}: ${options.body}`);
                    return new target(title, options);
                },
            });
        }"""
    )
    ordered = ground.order("told/one", steps=1, sample_every=0)
    tab.get_by_role("checkbox", name="notify me when a job ends").check()
    assert ground.done(ordered)
    tab.wait_for_function("shown.length > 0")
    assert tab.evaluate("shown") == ["LCM-LoRA is ready: told/one.safetensors"]


FOCUS = """() => {
    const { activeElement: focused } = document;
    const row = focused.closest('.lcm-jobs > li');
    const name = row?.querySelector('.lcm-name').textContent;
    return [name, focused.dataset.action ?? focused.className];
}"""


def test_the_focus_stays_and_rows_stay_under_the_mouse(browser, ground):
    ground.order("focus/runs", steps=5000, sample_every=0)
    ids = [ground.order(f"focus/{name}", steps=5000) for name in "bcd"]
    on_page = new_page(browser, ground.server.client())
    try:
        show_tab(on_page)
        reaches(on_page, "focus/d", "queued")

        def press(action, name, times=1):
            job(on_page, name).locator(f'[data-action="{action}"]').focus()
            for _ in range(times):
                on_page.keyboard.press("Enter")
                on_page.wait_for_timeout(1000)

        def names():
            return on_page.locator(".lcm-jobs .lcm-name").all_inner_texts()

        press("up", "focus/d")
        assert names() == ["focus/runs", "focus/b", "focus/d", "focus/c"]
        assert on_page.evaluate(FOCUS) == ["focus/d", "up"]
        press("delete", "focus/b", times=2)
        assert names() == ["focus/runs", "focus/d", "focus/c"]
        assert on_page.evaluate(FOCUS) == ["focus/d", "lcm-head"]

        job(on_page, "focus/d").locator(".lcm-name").hover()
        ground.store.move(ids[1], ids[2])
        on_page.wait_for_timeout(2000)
        assert names() == ["focus/runs", "focus/d", "focus/c"]
        on_page.mouse.move(1500, 800)
        on_page.wait_for_timeout(1000)
        assert names() == ["focus/runs", "focus/c", "focus/d"]
        row = job(on_page, "focus/runs")
        row.locator(".lcm-head").click()
        row.locator(".lcm-facts", has_text="gradient norm").wait_for(timeout=120_000)
        assert re.fullmatch(
            r"training|saving|drawing samples \d of \d", row.locator(".lcm-state").inner_text()
        )
        pictured(on_page, "facts")
        assert not on_page.wrong
    finally:
        on_page.context.close()
