"""Few-step LoRA Stack on the real server and in the real front end, and what files say there."""

import json
from urllib.parse import quote

import pytest
import torch
from lcm_lora.tests.server.pages import new_page, pictured
from lcm_lora.tests.server.test_bad_input import loading
from lcm_lora.tests.server.test_jobs import send
from lcm_lora.tests.server.test_workflows import images
from safetensors.torch import load_file, save_file

DESCRIBED = "info/described.safetensors"
EVIL = "<img src=x onerror=\"document.title='owned'\">"
NEW = """async ([vue, loras]) => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
    app.graph.clear();
    // The front end keeps widgets' values by the node's number, also when the graph is cleared.
    app.graph.last_node_id = window.lastNode = (window.lastNode ?? 0) + 100;
    const add = (type, x, y) => {
        const node = window.LiteGraph.createNode(type);
        node.pos = [x, y];
        app.graph.add(node);
        return node;
    };
    const load = add('CheckpointLoaderSimple', 60, 120), stack = add('LCMLoRAStack', 500, 120);
    const show = add('PreviewAny', 980, 120);
    load.connect(0, stack, 0);
    load.connect(1, stack, 1);
    stack.connect(3, show, 0);
    const set = (name, value) => {
        const widget = stack.widgets.find((widget) => widget.name === name);
        widget.value = value;
        widget.callback?.(value);
    };
    set('lora_name', loras[0]);
    set('count.lora_1', loras[1]);
    // Not that of the test before: a node in the host's cache says nothing.
    set('count.weight_1', vue ? 0.45 : 0.55);
    set('count.text_weight_1', 0.25);
    app.canvas.ds.reset();
    app.canvas.setDirty(true, true);
}"""
STACK = "app.graph.nodes.find((node) => node.type === 'LCMLoRAStack')"
VALUES = f"{STACK}.serialize().widgets_values"
PROMPT = """async () => Object.values((await app.graphToPrompt()).output)
    .find((node) => node.class_type === 'LCMLoRAStack').inputs"""
RUN = """async () => {
    const ended = new Promise((resolve) => {
        app.api.addEventListener('execution_success', () => resolve('done'), { once: true });
        app.api.addEventListener('execution_error', () => resolve('failed'), { once: true });
    });
    const late = new Promise((resolve) => setTimeout(() => resolve('not run'), 60000));
    await app.queuePrompt(0, 1); // older front ends say false although it is queued
    return await Promise.race([ended, late]);
}"""
SAID = f"() => {STACK}.widgets.find((w) => w.name === 'lcm_lora_text')?.element.innerText ?? ''"
CHOOSE = f"""(entries) => {{
    let options = app.canvas.getNodeMenuOptions({STACK}), item;
    for (const entry of entries) {{
        item = options.find((option) => option?.content === entry);
        options = item.submenu?.options;
    }}
    item.callback();
}}"""
CORNER = f"""() => {{
    const node = {STACK}, canvas = app.canvas.canvas.getBoundingClientRect();
    const [x, y] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] - 15]);
    return [x + canvas.x, y + canvas.y];
}}"""


def stacked(subject, rows) -> dict:
    """The prompt of `loading`, with the stack in place of Load LCM-LoRA and a CLIP from it."""
    prompt = loading(subject, subject.lcm_lora)
    inputs = {"model": ["1", 0], "clip": ["1", 1], "lora_name": subject.lcm_lora}
    inputs |= {"strength": 0.9, "family": "auto", "count": str(len(rows))}
    for number, (on, name, weight, text) in enumerate(rows, 1):
        inputs |= {f"count.on_{number}": on, f"count.lora_{number}": name}
        inputs |= {f"count.weight_{number}": weight, f"count.text_weight_{number}": text}
    prompt["2"] = {"class_type": "LCMLoRAStack", "inputs": inputs}
    prompt["3"]["inputs"]["clip"] = ["2", 1]
    return prompt


def drawn(client, prompt) -> torch.Tensor:
    return images(client.pictures(client.run(prompt))["7"])


@pytest.fixture(scope="module")
def loras(server, subject):
    """The folder of LoRAs, with a copy of the style whose metadata tells much, and evil."""
    folder = server.base / "models" / "loras"
    metadata = {
        "ss_output_name": EVIL,
        "modelspec.trigger_phrase": "in sticker style",
        "ss_tag_frequency": json.dumps({"10_x": {"sticker": 31, "a bag": 7, "<b>bold</b>": 2}}),
        "ss_num_train_images": "40",
        "modelspec.description": "x" * 5000,
        EVIL: EVIL,
    }
    (folder / DESCRIBED).parent.mkdir(exist_ok=True)
    save_file(load_file(folder / subject.style_lora), folder / DESCRIBED, metadata)
    return folder


@pytest.fixture(scope="module")
def page(browser, client, loras):
    made = new_page(browser, client)
    yield made
    made.context.close()


def test_an_api_prompt_draws_what_the_hosts_loaders_draw(client, subject, loras):
    rows = [(True, subject.style_lora, 0.6, 0.3), (False, subject.second_style, 1.0, 1.0)]
    ours = drawn(client, stacked(subject, rows))
    chain = loading(subject, subject.lcm_lora)
    chain["2"]["inputs"]["strength"] = 0.9
    chain["8"] = {
        "class_type": "LoraLoader",
        "inputs": {
            "model": ["2", 0], "clip": ["1", 1], "lora_name": subject.style_lora,
            "strength_model": 0.6, "strength_clip": 0.3,
        },
    }  # fmt: skip
    chain["3"]["inputs"]["clip"], chain["5"]["inputs"]["model"] = ["8", 1], ["8", 0]
    assert (ours - drawn(client, chain)).abs().max() < 1.5 / 255
    rows[1] = (True, *rows[1][1:])
    assert (ours - drawn(client, stacked(subject, rows))).abs().mean() > 0.005


def test_a_file_of_a_row_that_changed_is_read_anew(client, subject, loras):
    name = "info/changing.safetensors"
    (loras / name).write_bytes((loras / subject.style_lora).read_bytes())
    rows = [(True, name, 1.0, 1.0)]
    before = drawn(client, stacked(subject, rows))
    tensors = load_file(loras / name)
    save_file({key: value * 2 for key, value in tensors.items()}, loras / name)
    after = stacked(subject, rows)
    after["7"]["inputs"]["filename_prefix"] = "anew"
    assert (drawn(client, after) - before).abs().mean() > 0.005


def choose(page, vue, *entries) -> None:
    """Chooses from the node's menu, by the mouse."""
    from playwright.sync_api import TimeoutError

    page.keyboard.press("Escape")
    if vue:
        node = page.evaluate(f"String({STACK}.id)")
        header = page.locator(f'[data-node-id="{node}"]').first
        header.click(button="right", position={"x": 70, "y": 14})
    else:
        # The front end finds a node under the pointer once it has drawn it.
        page.wait_for_function(f"() => app.canvas.visible_nodes.includes({STACK})")
        page.mouse.click(*page.evaluate(CORNER), button="right")
    *folders, last = (page.get_by_text(entry, exact=True).last for entry in entries)
    for folder in folders:
        folder.hover()
        try:  # a menu that opens late would be closed by a click
            last.wait_for(timeout=5000)
        except TimeoutError:
            folder.click()
    page.wait_for_timeout(400)
    last.click()
    page.wait_for_timeout(400)


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_rows_are_added_moved_removed_run_saved_and_told_about(page, subject, vue):
    page.evaluate(NEW, [vue, [subject.lcm_lora, DESCRIBED]])
    page.wait_for_timeout(800)
    weight = 0.45 if vue else 0.55
    head, first = [subject.lcm_lora, 1, "auto"], [True, DESCRIBED, weight, 0.25]
    fresh = [True, "None", 0.8, 0.8]
    assert page.evaluate(VALUES) == [*head, "1", *first]
    choose(page, vue, "LoRA rows", "Add a row")
    assert page.evaluate(VALUES) == [*head, "2", *first, *fresh]
    choose(page, vue, "LoRA rows", "Move row 2 up")
    assert page.evaluate(VALUES) == [*head, "2", *fresh, *first]
    # By the node's own list of numbers, the values stay too.
    page.evaluate(
        f"""() => {{
            const widget = {STACK}.widgets.find((w) => w.name === 'count');
            widget.value = '3';
            widget.callback('3');
        }}"""
    )
    assert page.evaluate(VALUES) == [*head, "3", *fresh, *first, *fresh]
    choose(page, vue, "LoRA rows", "Remove row 1")
    assert page.evaluate(VALUES) == [*head, "2", *first, *fresh]
    pictured(page, f"rows-{vue}")

    saved = page.evaluate("app.graph.serialize()")
    sent = page.evaluate(PROMPT)
    assert sent["count"] == "2" and sent["count.lora_1"] == DESCRIBED and sent["count.on_2"] is True
    assert page.evaluate(RUN) == "done"
    page.wait_for_timeout(1200)
    pictured(page, f"rows-run-{vue}")
    lines = page.evaluate(SAID).splitlines()
    assert lines[0] == "lcm; LoRAs applied: 2" and lines[1].startswith("1 x demo-lcm-lora: ")
    assert lines[2].startswith(f"{weight} / 0.25 x described: ")
    page.evaluate("async (saved) => await app.loadGraphData(saved, true, true, 'rows')", saved)
    page.wait_for_timeout(800)
    assert page.evaluate(VALUES) == [*head, "2", *first, *fresh]
    assert page.evaluate(PROMPT) == sent
    # Of rows that came with a workflow too, the values stay.
    choose(page, vue, "LoRA rows", "Add a row")
    assert page.evaluate(VALUES) == [*head, "3", *first, *fresh, *fresh]

    if vue:
        choose(page, vue, "LoRA info ...", DESCRIBED)
    else:  # two menus deep, the mouse did not always hit it beside other tests
        page.evaluate(CHOOSE, ["LoRA info ...", DESCRIBED])
    dialog = page.locator("dialog.lcm-info")
    dialog.get_by_text("in sticker style").first.wait_for()
    text = dialog.inner_text()
    pictured(page, f"rows-info-{vue}")
    assert "sticker (31), a bag (7), <b>bold</b> (2)" in text and "SD1.5" in text and EVIL in text
    dialog.locator("summary").last.click()
    assert EVIL in dialog.locator("details dt").first.inner_text()
    assert page.locator("dialog.lcm-info img, dialog.lcm-info b").count() == 0
    assert page.title() != "owned"
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert page.evaluate(VALUES) == [*head, "3", *first, *fresh, *fresh]
    assert not page.wrong and not page.foreign


def test_links_move_with_their_rows_and_combine_keeps_its_weights(page, subject):
    page.evaluate(NEW, [False, [subject.lcm_lora, DESCRIBED]])
    page.evaluate(
        f"""() => {{
            const stack = {STACK}, number = window.LiteGraph.createNode('PrimitiveFloat');
            number.pos = [60, 400];
            app.graph.add(number);
            const count = stack.widgets.find((widget) => widget.name === 'count');
            count.value = '2';
            count.callback('2');
            const slot = stack.inputs.findIndex(({{ name }}) => name === 'count.weight_1');
            number.connect(0, stack, slot);
        }}"""
    )
    linked = f"{STACK}.inputs.filter((i) => i.link != null).map((i) => i.name).sort().join(' ')"
    assert page.evaluate(linked) == "clip count.weight_1 model"
    choose(page, False, "LoRA rows", "Move row 1 down")
    assert page.evaluate(linked) == "clip count.weight_2 model"
    sent = page.evaluate(PROMPT)
    assert isinstance(sent["count.weight_2"], list) and sent["count.weight_1"] == 0.8
    choose(page, False, "LoRA rows", "Remove row 1")
    assert page.evaluate(linked) == "clip count.weight_1 model"
    assert page.evaluate(PROMPT)["count.lora_1"] == DESCRIBED
    weights = page.evaluate(
        """() => {
            const node = window.LiteGraph.createNode('LCMLoRACombine');
            app.graph.add(node);
            const of = (name) => node.widgets.find((widget) => widget.name === name);
            of('count.weight_2').value = 0.3;
            for (const count of ['5', '3']) {
                of('count').value = count;
                of('count').callback(count);
            }
            return [1, 2, 3].map((row) => of(`count.weight_${row}`).value);
        }"""
    )
    assert weights == [1, 0.3, 0.8]
    assert not page.wrong


def test_what_a_file_says_over_http(client, subject, loras):
    status, answer = send(client, f"lora?name={quote(DESCRIBED)}", None, "GET")
    assert status == 200 and answer["name"] == DESCRIBED
    facts = answer["facts"]
    assert facts["architecture"] == "SD1.5" and facts["training pictures"] == "40"
    assert facts["trigger words"] == "in sticker style" and "family" not in facts
    assert max(map(len, [*facts.values(), *answer["metadata"].values()])) <= 1000
    _, fast = send(client, f"lora?name={quote(subject.lcm_lora)}", None, "GET")
    assert fast["facts"]["family"] == "lcm" and fast["facts"]["rank"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "lists no LoRA"),
        ("gone.safetensors", "lists no LoRA 'gone.safetensors'"),
        ("../checkpoints/{checkpoint}", "lists no LoRA"),
        ("/etc/passwd", "lists no LoRA"),
        ("bad/cut.safetensors", "cut.safetensors is not a complete safetensors file"),
        ("bad/text.safetensors", "text.safetensors is a web page"),
        ("bad/pickle.pt", "lists no LoRA"),
    ],
)
def test_a_file_that_cannot_be_told_about_is_explained(client, subject, loras, name, says):
    (loras / "bad").mkdir(exist_ok=True)
    content = (loras / subject.style_lora).read_bytes()
    (loras / "bad" / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (loras / "bad" / "text.safetensors").write_bytes(b"<html>404</html>" * 20)
    (loras / "bad" / "pickle.pt").write_bytes(b"\x80\x04" + content[:100])
    asked = quote(name.format(checkpoint=subject.checkpoint), safe="")
    status, answer = send(client, f"lora?name={asked}", None, "GET")
    assert status == 400 and says in answer["error"], answer
    assert str(loras.parent) not in answer["error"]
