"""What the page offers beside nodes and tab: blueprint, apps, commands, keys, settings, link."""

import json
from pathlib import Path

import pytest
from lcm_lora.dev import environment
from lcm_lora.tests.server.pages import QUEUED, files_here, new_page, pictured
from lcm_lora.tests.server.test_templates import OPENED, WORKFLOWS

BLUEPRINT = Path(__file__).resolve().parents[2] / "subgraphs" / "LCM text to image.json"
APPS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in WORKFLOWS}
KINDS = """app.graph.nodes.map((node) => node.type)"""


@pytest.fixture(scope="module")
def page(browser, client):
    made = new_page(browser, client)
    yield made
    assert not made.wrong
    made.context.close()


@pytest.fixture(scope="module")
def primary(host_folder):
    """Skips on older hosts, whose front ends have no apps and other searches."""
    if environment.PRIMARY not in host_folder.parent.name:
        pytest.skip("this host's front end has no apps")


def cleared(page, vue=True) -> None:
    page.evaluate(
        """async (vue) => {
            await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
            app.graph.clear();
        }""",
        vue,
    )


def test_the_blueprint_is_served(client):
    offered = [entry["name"] for entry in client.get("/global_subgraphs").values()]
    assert BLUEPRINT.stem in offered


@pytest.mark.usefixtures("primary")
def test_the_blueprint_is_found_and_draws(page, subject):
    cleared(page)
    page.mouse.dblclick(700, 500)
    page.wait_for_timeout(1000)
    page.keyboard.type(BLUEPRINT.stem, delay=20)
    page.wait_for_timeout(1500)
    page.keyboard.press("Enter")
    page.wait_for_timeout(1000)
    page.mouse.click(500, 300)  # where newer front ends put it
    page.wait_for_function("app.graph.nodes.length === 1")
    drawn = page.evaluate(
        """async ([files, size]) => {
            const [block] = app.graph.nodes;
            const set = (name, value) => {
                block.widgets.find((widget) => widget.name === name).value = value;
            };
            set('ckpt_name', files['v1-5-pruned-emaonly-fp16.safetensors']);
            set('lora_name', files['lcm-lora-sdv1-5.safetensors']);
            set('width', size);
            set('height', size);
            const preview = LiteGraph.createNode('PreviewImage');
            preview.pos = [block.pos[0] + 500, block.pos[1]];
            app.graph.add(preview);
            block.connect(0, preview, 0);
            const ended = new Promise((resolve) => {
                app.api.addEventListener('execution_success', () => resolve('drawn'));
                app.api.addEventListener('execution_error', () => resolve('failed'));
            });
            if (!QUEUED) return JSON.stringify(app.lastNodeErrors);
            return await ended;
        }""".replace("QUEUED", QUEUED),
        [files_here(subject), subject.size],
    )
    page.wait_for_timeout(500)
    pictured(page, "blueprint")
    assert drawn == "drawn"
    names = page.evaluate("app.graph.nodes[0].widgets.map((widget) => widget.name)")
    assert {"text", "steps", "cfg", "seed", "ckpt_name", "lora_name"} <= set(names)


@pytest.mark.usefixtures("primary")
@pytest.mark.parametrize("stem", APPS)
def test_every_template_is_an_app_with_its_inputs(page, subject, stem):
    text = json.dumps(APPS[stem])
    for official, own in files_here(subject).items():
        text = text.replace(official, own)
    chosen = APPS[stem]["extra"]["linearData"]
    page.evaluate(OPENED, [json.loads(text), stem, True])
    page.evaluate("app.extensionManager.command.execute('Comfy.ToggleLinear')")
    try:
        page.get_by_test_id("linear-run-button").first.wait_for()
        items = page.get_by_test_id("app-mode-widget-item")
        items.nth(len(chosen["inputs"]) - 1).wait_for()
        page.wait_for_timeout(500)
        pictured(page, f"app-{stem}")
        names = [item.inner_text().splitlines()[0] for item in items.all()]
        assert len(names) == len(chosen["inputs"])
        assert len(set(names)) == len(names), "two fields of the app have one name"
    finally:
        page.evaluate("app.extensionManager.command.execute('Comfy.ToggleLinear')")
    kinds = {node["id"]: node["type"] for node in APPS[stem]["nodes"]}
    assert {kinds[node] for node in chosen["outputs"]} <= {"SaveImage", "PreviewImage"}


def test_a_key_opens_the_tab(page):
    cleared(page)
    page.mouse.click(900, 600)
    page.keyboard.press("l")
    page.wait_for_selector(".lcm-panel")
    page.keyboard.press("l")
    page.wait_for_selector(".lcm-panel", state="detached")


def test_a_command_opens_the_template_of_a_distillation(page):
    page.evaluate("app.extensionManager.command.execute('lcm_lora.distil')")
    page.wait_for_function(f"{KINDS}.includes('LCMDistill')")


def test_a_checkpoints_menu_adds_a_loader_and_a_distillation(page, subject):
    cleared(page, vue=False)
    page.evaluate(
        """(checkpoint) => {
            const made = (type, x) => {
                const node = LiteGraph.createNode(type);
                node.pos = [x, 200];
                app.graph.add(node);
                return node;
            };
            const load = made('CheckpointLoaderSimple', 300), sampler = made('LCMKSampler', 1200);
            load.widgets[0].value = checkpoint;
            load.connect(0, sampler, 0);
            const offered = app.canvas.getNodeMenuOptions(load);
            for (const name of ['Add Load LCM-LoRA', 'Distil an LCM-LoRA from it']) {
                offered.find((item) => item?.content === name).callback();
            }
        }""",
        subject.checkpoint,
    )
    page.wait_for_timeout(500)
    pictured(page, "checkpoint menu")
    assert sorted(page.evaluate(KINDS)) == [
        "CheckpointLoaderSimple", "LCMDistill", "LCMDistillData", "LCMKSampler", "LCMLoRALoader",
    ]  # fmt: skip
    source, checkpoint, data = page.evaluate("""() => {
        const node = (type) => app.graph.nodes.find((each) => each.type === type);
        const distil = node('LCMDistill');
        return [
            node('LCMKSampler').getInputNode(0).type,
            distil.widgets.find(({ name }) => name === 'checkpoint').value,
            distil.getInputNode(distil.inputs.findIndex(({ name }) => name === 'data')).type,
        ];
    }""")
    assert (source, checkpoint, data) == ("LCMLoRALoader", subject.checkpoint, "LCMDistillData")


def test_settings_and_about_page_have_ours(page):
    page.evaluate("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("LCM-LoRA", exact=True).first.click()
    dialog.get_by_text("Notify me when a distillation job ends").first.wait_for()
    pictured(page, "settings")
    dialog.get_by_text("About", exact=True).first.click()
    link = dialog.locator("a[href='https://github.com/lcm-lora/comfyui-lcm-lora']")
    link.wait_for()
    pictured(page, "about")
    assert "LCM-LoRA" in link.inner_text()
    page.keyboard.press("Escape")
