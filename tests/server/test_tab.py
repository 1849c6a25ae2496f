"""What the tab "LCM-LoRA jobs" shows of finished jobs: charts, sample pictures, actions."""

import csv

import pytest
from lcm_lora.tests.server.ended import lay
from lcm_lora.tests.server.pages import new_page, pictured
from lcm_lora.tests.server.test_page import job, reaches, show_tab


@pytest.fixture
def tab(browser, ground):
    """A page of a server of its own, with the tab open."""
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
    assert lines[0]["distance_1_step"] == "" and float(lines[0]["lr"]) == 1e-3


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
