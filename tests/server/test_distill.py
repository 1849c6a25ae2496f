"""Distil LCM-LoRA on the page: what it will take, then how far it is."""

import json
import re

import pytest
from lcm_lora.dev import environment
from lcm_lora.tests.server.pages import files_here, opened, pictured
from lcm_lora.tests.server.test_page import job, show_tab
from lcm_lora.tests.server.test_texts import HELPERS, OPEN, OVERLAPS, TEXTS
from lcm_lora.tests.server.test_workflows import ALL

TEMPLATE = next(path for path in ALL if path.stem == "Distil an LCM-LoRA")
STEPS = 24  # it still trains when the page says so
QUEUE = "async () => { await app.queuePrompt(0, 1); }"
FITTED = """([checkpoint, name, steps]) => {
    const named = (type) => app.graph.nodes.find((node) => node.type === type);
    set(named('LCMDistillData'), { 'source.prompts': 'a photo of a bag', 'source.count': 4,
        'source.draw_steps': 2, resolution: 64, auto_resolution: false });
    set(named('LCMDistill'), { checkpoint, name, length: 'custom', steps, batch: 2, rank: 4,
        guidance: 2.5, sample_every: 0, checkpoint_every: 20, policy: 'share' });
    const length = named('LCMDistill').widgets.find(({ name }) => name === 'length');
    length.callback?.('custom');
    // The front end looks for changes after each click.
    window.dispatchEvent(new MouseEvent('mouseup', { bubbles: true }));
}"""

SET = """(values) => {
    set(app.graph.nodes.find(({ type }) => type === 'LCMDistill'), values);
    window.dispatchEvent(new MouseEvent('mouseup', { bubbles: true }));
}"""


def template(subject) -> dict:
    text = TEMPLATE.read_text(encoding="utf-8")
    for official, own in files_here(subject).items():
        text = text.replace(official, own)
    return json.loads(text)


def text_of(page, pattern, seconds=60, node="LCMDistill") -> str:
    """The text of Distil LCM-LoRA, or of another node, when it fits the pattern."""
    for _ in range(seconds * 5):
        text = page.evaluate(TEXTS).get(node, "")
        if re.search(pattern, text):
            return text
        page.wait_for_timeout(200)
    raise AssertionError(f"no {pattern!r} in {text!r}")


@pytest.mark.parametrize("vue", [False, True])
def test_it_says_what_it_takes_and_then_how_far_it_is(page, client, subject, host_folder, vue):
    page.evaluate(OPEN, [template(subject), vue])
    page.evaluate(HELPERS)
    first = text_of(page, "disk")
    assert (
        first.splitlines()[0] == "1,000 steps of 12 pictures, 512 pixels, 1,000 drawn from prompts"
    )
    pictured(page, f"distill-estimate-{vue}")
    if vue:
        widgets = page.locator("[data-node-id='3'] .lg-node-widget")
        assert widgets.count() == 4  # checkpoint, name, length and the text
        # With no room for the others; older front ends leave it.
        height = page.evaluate("app.graph.getNodeById(3).size[1]")
        assert height < 350 or environment.PRIMARY not in host_folder.parent.name
    assert page.evaluate(OVERLAPS) == []

    page.evaluate(FITTED, [subject.checkpoint, f"distill/{vue}", STEPS])
    ordered = f"{STEPS} steps of 2 pictures, 64 pixels, 4 drawn from prompts"
    warned = text_of(page, re.escape(ordered)).splitlines()
    assert warned[0] == "⚠ SD1.5 is made for 512 pixels: switch auto_resolution on."
    if vue:  # the number of steps too, for it counts now
        page.wait_for_timeout(500)
        assert widgets.count() == 5
        assert widgets.nth(2).inner_text().startswith("steps")
    page.evaluate(QUEUE)
    running = text_of(page, rf"step \d+ of {STEPS} · loss [\d.]+ · .* left", 120).splitlines()
    assert running[0] == "training" and running[-1] == ordered
    # Distillation Job Status follows by itself.
    text_of(page, rf"^\S.*\nstep \d+ of {STEPS} · loss", node="LCMJobStatus")
    pictured(page, f"distill-running-{vue}")

    saved = page.evaluate("app.graph.serialize()")
    opened(page, client)  # reloaded in the middle
    page.evaluate(OPEN, [saved, vue])
    page.evaluate(HELPERS)
    done = text_of(page, "Finished", 240)
    assert done == f"Finished: distill/{vue}.safetensors\n{ordered}"
    status = text_of(page, "^done", node="LCMJobStatus")
    assert re.fullmatch(
        rf"done\nstep {STEPS} of {STEPS} · loss \S+ · {done.splitlines()[0]}", status
    )
    pictured(page, f"distill-done-{vue}")
    assert page.evaluate(OVERLAPS) == []

    # Other settings are another job, and the finished one has measured the speed.
    page.evaluate(FITTED, [subject.checkpoint, f"distill/{vue}", 300])
    assert "measured by an earlier job" in text_of(page, "\n300 steps")

    # The tab opens the graph that ordered the job, with its settings of then.
    show_tab(page)
    row = job(page, f"distill/{vue}")
    row.locator(".lcm-head").click()
    row.get_by_role("button", name="open its workflow").click()
    assert ordered in text_of(page, re.escape(ordered)).splitlines()
    assert not page.wrong


@pytest.mark.parametrize("vue", [False, True])
def test_it_warns_before_the_queue_refuses(page, subject, vue):
    refused = []
    page.on("response", lambda answer: answer.status == 400 and refused.append(answer.url))
    page.evaluate(OPEN, [json.loads(TEMPLATE.read_text(encoding="utf-8")), vue])
    page.evaluate(HELPERS)
    assert text_of(page, "is missing").startswith("⚠ v1-5-pruned-emaonly-fp16.safetensors is")
    lora = subject.lcm_lora.removesuffix(".safetensors")
    page.evaluate(FITTED, [subject.checkpoint, lora, 30])
    taken = text_of(page, "30 steps")
    assert f"⚠ {lora} exists already: choose another name, or switch overwrite on." in taken
    pictured(page, f"distill-taken-{vue}")
    page.evaluate(SET, {"overwrite": True})
    assert f"{lora} exists already and will be replaced." in text_of(page, "replaced")
    page.evaluate(SET, {"device": "77"})
    assert text_of(page, "no device 77").startswith("⚠ There")
    page.evaluate(SET, {"device": "", "style_lora": "gone.safetensors"})
    forecast = text_of(page, "gone")
    assert forecast.startswith("⚠ ComfyUI lists no 'gone.safetensors' among its loras:")
    assert not refused
    page.evaluate(QUEUE)  # the host refuses the prompt
    page.wait_for_timeout(1500)
    assert len(refused) == 1
    pictured(page, f"distill-refused-{vue}")
    assert text_of(page, "gone") == forecast
    assert not page.wrong


def test_it_is_said_in_the_language_of_the_page(page_in, subject):
    page = page_in("ko")
    page.evaluate(OPEN, [template(subject), False])
    text = text_of(page, "디스크")
    pictured(page, "distill-korean")
    assert not re.search("[a-z]{3}", text)
