"""The texts on nodes in the real front end: they stay after a run, fit, and go before an error."""

import json
import re
from copy import deepcopy

import pytest
from lcm_lora.tests.server.pages import QUEUED, files_here, new_page, opened, pictured
from lcm_lora.tests.server.test_templates import WORKFLOWS

WORKFLOW = next(path for path in WORKFLOWS if path.stem == "1 Text to image (SD1.5)")
OPEN = """async ([workflow, vue]) => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
    await app.loadGraphData(workflow, true, true, 'texts');
}"""
RUN = """async (settings) => {
    const sampler = app.graph.nodes.find((node) => node.type === 'LCMKSampler');
    for (const [name, value] of Object.entries(settings)) {
        sampler.widgets.find((widget) => widget.name === name).value = value;
    }
    const ended = new Promise((resolve) => {
        app.api.addEventListener('execution_success', () => resolve('drawn'), { once: true });
        app.api.addEventListener('execution_error', () => resolve('failed'), { once: true });
    });
    if (!QUEUED) return 'refused';
    return await ended;
}""".replace("QUEUED", QUEUED)
TEXTS = """() => Object.fromEntries(app.graph.nodes.map((node) => {
    const widget = node.widgets?.find((widget) => widget.name === 'lcm_lora_text');
    return [node.type, widget ? widget.element.innerText : null];
}).filter(([, text]) => text !== null))"""
# Of each text: whether the page shows it whole.
CUT = """() => [...document.querySelectorAll('.lcm-said')].filter((element) => element.innerText)
    .map((element) => [element.isConnected && element.offsetHeight > 0,
        element.scrollHeight - element.clientHeight, element.scrollWidth - element.clientWidth])"""
OVERLAPS = """() => {
    const boxes = app.graph.nodes.map((node) => [node.type, ...node.getBounding()]);
    return boxes.flatMap(([a, x, y, w, h], i) => boxes.slice(i + 1)
        .filter(([, u, v, p, q]) => x < u + p && u < x + w && y < v + q && v < y + h)
        .map(([b]) => `${a} on ${b}`));
}"""
# Lines wrap more often in a node that a user makes as narrow as it can be.
NARROW = """() => {
    for (const node of app.graph.nodes) node.setSize([node.computeSize()[0], node.size[1]]);
}"""
VERDICT = "lcm, 4 steps: 999 759 499 259; cfg 1, negative prompt unused"


@pytest.fixture(scope="module")
def page(browser, client):
    made = new_page(browser, client)
    yield made
    made.context.close()


@pytest.fixture(scope="module")
def workflow(subject):
    text = WORKFLOW.read_text(encoding="utf-8")
    text = text.replace("v1-5-pruned-emaonly-fp16.safetensors", subject.checkpoint)
    made = json.loads(text.replace("lcm-lora-sdv1-5.safetensors", subject.lcm_lora))
    for node in made["nodes"]:
        if node["type"] == "EmptyLatentImage":
            node["widgets_values"][:2] = [64, 64]
    return made


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_they_stay_fit_and_are_saved(page, workflow, vue):
    workflow = deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"] == "LCMLoRALoader":  # or the server has its result from another test
            node["widgets_values"][1] = 0.97 - vue * 0.01
    page.evaluate(OPEN, [workflow, vue])
    assert page.evaluate(TEXTS) == {}
    before = page.evaluate("app.graph.serialize().nodes.map((node) => node.widgets_values)")
    assert page.evaluate(RUN, {"seed": 2 + vue}) == "drawn"
    page.wait_for_timeout(1500)  # newer front ends remove progress texts now
    texts = page.evaluate(TEXTS)
    pictured(page, f"texts-{vue}")
    assert texts["LCMKSampler"] == VERDICT
    assert texts["LCMLoRALoader"].startswith("lcm: ")
    shown = page.evaluate(CUT)
    assert len(shown) == 2
    for visible, low, wide in shown:
        assert visible and low <= 0 and wide <= 0
    assert page.evaluate(OVERLAPS) == []  # the template leaves room
    page.evaluate(NARROW)
    page.wait_for_timeout(500)
    pictured(page, f"texts-narrow-{vue}")
    for visible, low, wide in page.evaluate(CUT):
        assert visible and low <= 0 and wide <= 0

    saved = page.evaluate("app.graph.serialize()")
    after = [node.get("widgets_values") for node in saved["nodes"]]
    seeds = [[*(v or [])][1:] for v in after], [[*(v or [])][1:] for v in before]
    assert seeds[0] == seeds[1]
    page.evaluate(OPEN, [saved, vue])
    page.wait_for_timeout(500)
    assert page.evaluate(TEXTS) == texts
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert not any("lcm_lora_text" in node["inputs"] for node in prompt.values())

    assert page.evaluate(RUN, {"cfg": 7, "seed": 5 + vue}) == "drawn"
    page.wait_for_timeout(500)
    pictured(page, f"texts-warning-{vue}")
    lines = page.evaluate(TEXTS)["LCMKSampler"].splitlines()
    assert lines[0] == "⚠ cfg 7 burns the colours: use 1 to 2."
    assert lines[-1] == "lcm, 4 steps: 999 759 499 259; cfg 7"
    # An error while it runs, and a value that the server refuses.
    assert page.evaluate(RUN, {"cfg": 1, "steps": 40, "denoise": 0.5}) == "failed"
    page.wait_for_timeout(500)
    assert page.evaluate(TEXTS)["LCMKSampler"] == ""
    assert page.evaluate(RUN, {"steps": 4, "denoise": 1}) == "drawn"
    page.wait_for_timeout(500)
    assert page.evaluate(TEXTS)["LCMKSampler"] == VERDICT
    page.evaluate(RUN, {"noise_device": "none such"})
    page.wait_for_timeout(1000)
    assert page.evaluate(TEXTS)["LCMKSampler"] == ""
    assert not page.wrong


# Nodes that speak and are in neither template, each joined to what gives it its input.
MERGE = """() => {
    const loader = app.graph.nodes.find((node) => node.type === 'LCMLoRAVectorLoader');
    const blocks = put('LCMLoRABlocks', { text_encoder: 0.5 }, [1450, 700]);
    loader.connect(0, blocks, 0);
    const save = put('LCMLoRASave', { filename: 'texts/blocks', overwrite: true }, [1850, 700]);
    blocks.connect(0, save, 0);
    set(app.graph.nodes.find((node) => node.type === 'LCMLoRASave'), { overwrite: true });
    const size = app.graph.nodes.find((node) => node.type === 'EmptyLatentImage');
    set(size, { width: 64, height: 64 });
}"""
DISTIL = """(checkpoint) => {
    const named = (type) => app.graph.nodes.find((node) => node.type === type);
    set(named('LCMDistillData'), { 'source.prompts': 'a photo of a bag', 'source.count': 4,
        'source.draw_steps': 2, resolution: 64, auto_resolution: false });
    set(named('LCMDistill'), { checkpoint, name: 'texts/job', length: 'custom', steps: 12, batch: 2,
        rank: 4, guidance: 2.5, sample_every: 12, checkpoint_every: 12, policy: 'share' });
    const result = put('LCMJobResult', {}, [600, 950]);
    named('LCMDistill').connect(0, result, 0);
    result.connect(1, put('PreviewAny', {}, [1000, 950]), 0);
    window.live = '';
    app.api.addEventListener('lcm_lora.text', () => {
        live += result.widgets.find(({ name }) => name === 'lcm_lora_text').element.innerText;
    });
}"""
HELPERS = """() => {
    window.set = (node, values) => {
        for (const [name, value] of Object.entries(values)) {
            node.widgets.find((widget) => widget.name === name).value = value;
        }
    };
    window.put = (type, values, pos) => {
        const node = LiteGraph.createNode(type);
        node.pos = pos;
        app.graph.add(node);
        set(node, values);
        return node;
    };
}"""

# Texts that are outside of the view, or drawn small, are not on the page.
UNSCALED = """() => {
    const { ds } = app.canvas;
    const corner = (at) => Math.min(...app.graph.nodes.map((node) => node.pos[at]));
    ds.scale = 1;
    ds.offset[0] = 100 - corner(0);
    ds.offset[1] = 120 - corner(1);
    app.canvas.setDirty(true, true);
}"""


def in_language(page, client, locale) -> None:
    client.post("/settings", {"Comfy.Locale": locale})
    opened(page, client)


def whole(page, count) -> None:
    """So many texts are there, each whole, in both renderings."""
    page.set_viewport_size({"width": 2400, "height": 1350})
    for vue in (False, True):
        page.evaluate("(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", vue)
        page.evaluate(UNSCALED)
        page.wait_for_timeout(1000)
        pictured(page, f"texts-of-{count}-{'vue' if vue else 'canvas'}")
        shown = page.evaluate(CUT)
        assert len(shown) == count
        for visible, low, wide in shown:
            assert visible and low <= 0 and wide <= 0, "vue" if vue else "canvas"


def test_every_node_that_speaks_keeps_its_text(page, client, subject):
    texts_of, saved = {}, []
    for stem, prepare, count in (
        ("Merge three LoRAs into one (SDXL)", MERGE, 7), ("Distil an LCM-LoRA", DISTIL, 3),
    ):  # fmt: skip
        text = next(path for path in WORKFLOWS if path.stem == stem).read_text(encoding="utf-8")
        for official, own in files_here(subject).items():
            text = text.replace(official, own)
        page.evaluate(OPEN, [json.loads(text), False])
        page.evaluate(HELPERS)
        page.evaluate(prepare, subject.checkpoint)
        # Twice, so that the status of the job is that of its end.
        for _ in range(2):
            assert page.evaluate(RUN, {}) == "drawn"
        page.wait_for_timeout(1500)  # newer front ends remove progress texts now
        texts = page.evaluate(TEXTS)
        whole(page, count)
        texts_of |= texts
        saved.append((page.evaluate("app.graph.serialize()"), texts.keys(), count))
    assert re.search(r"step \d+ of 12", page.evaluate("live"))
    in_language(page, client, "ko")
    try:
        for graph, kinds, count in saved:
            page.evaluate(OPEN, [graph, False])
            page.wait_for_timeout(500)
            korean = page.evaluate(TEXTS)
            whole(page, count)
            assert korean.keys() == kinds
            for kind, line in korean.items():
                assert re.search("[가-힣]", line), f"{kind}: {line}"
    finally:
        in_language(page, client, "en")
    assert texts_of["LCMLoRACombine"].startswith("exact: ")
    assert re.match(r"lcm: \d+ of \d+ modules applied", texts_of["LCMLoRAApply"])
    assert "has no modules for text" in texts_of["LCMLoRABlocks"]
    assert texts_of["LCMLoRASave"].startswith("Saved ")
    assert texts_of["LCMModelSampling"].startswith("lcm, from ")
    assert texts_of["LCMKSampler"].startswith("lcm, 4 steps")
    ordered = "12 steps of 2 pictures, 64 pixels, 4 drawn from prompts"
    finished = "Finished: texts/job.safetensors"
    assert texts_of["LCMDistill"] == f"{finished}\n{ordered}"
    assert re.fullmatch(rf"done\nstep 12 of 12 · loss \S+ · {finished}", texts_of["LCMJobStatus"])
    assert texts_of["LCMJobResult"] == finished
    assert not page.wrong


def test_they_are_in_the_language_of_the_page(page, client, workflow):
    in_language(page, client, "ko")
    try:
        page.evaluate(OPEN, [workflow, False])
        assert page.evaluate(RUN, {"seed": 9}) == "drawn"
        page.wait_for_timeout(500)
        assert page.evaluate(TEXTS)["LCMKSampler"].startswith("lcm, 4스텝: 999 759 499 259; cfg 1")
    finally:
        client.post("/settings", {"Comfy.Locale": "en"})
