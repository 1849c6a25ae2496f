"""A flow model in the real server and page: a small SD3 with random weights, in one file."""

import json

import pytest
import torch
from lcm_lora.tests.server.pages import QUEUED, new_page, pictured
from safetensors.torch import save_file

CHECKPOINT, LORA = "small-sd3.safetensors", "Hyper-SD3-4steps-CFG-lora.safetensors"
GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
    "2": {
        "class_type": "LCMLoRALoader",
        "inputs": {"model": ["1", 0], "lora_name": LORA, "strength": 0.5, "family": "auto"},
    },
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red bag"}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
    "5": {
        "class_type": "EmptySD3LatentImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 2},
    },
    "6": {
        "class_type": "LCMKSampler",
        "inputs": {
            "model": ["2", 0], "seed": 1, "steps": 4, "cfg": 3.0, "positive": ["3", 0],
            "negative": ["4", 0], "latent": ["5", 0], "denoise": 1.0, "eta": -1.0,
            "noise_device": "cpu",
        },
    },
    "7": {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": "flow"}},
}  # fmt: skip
OPEN = """async ([graph, vue]) => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
    await app.loadApiJson(graph, 'flow');
    await new Promise((resolve) => setTimeout(resolve, 500));
    app.graph.arrange(120);
    app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [60, 80];
}"""
RUN = """async () => {
    const ended = new Promise((resolve) => {
        app.api.addEventListener('execution_success', () => resolve('drawn'), { once: true });
        app.api.addEventListener('execution_error',
            (event) => resolve(event.detail.exception_message), { once: true });
    });
    if (!QUEUED) return 'refused';
    return await ended;
}""".replace("QUEUED", QUEUED)
CHOOSE = """([type, name, value]) => {
    app.graph.nodes.find((node) => node.type === type)
        .widgets.find((widget) => widget.name === name).value = value;
}"""
TEXTS = """() => Object.fromEntries(app.graph.nodes.map((node) => {
    const widget = node.widgets?.find((widget) => widget.name === 'lcm_lora_text');
    return [node.type, widget ? widget.element.innerText : null];
}).filter(([, text]) => text !== null))"""


@pytest.fixture(scope="module")
def files(server):
    """The checkpoint and a LoRA for it, where the server looks for them."""
    from lcm_lora.tests.host import sd3_file, tiny_flow

    network = tiny_flow.sd3_network(width=4096, pooled=2048)
    layer = "joint_blocks.0.x_block.mlp.fc1"
    out, inside = network.get_parameter(f"{layer}.weight").shape
    module = f"lora_unet_{layer.replace('.', '_')}"
    lora = {
        f"{module}.lora_up.weight": torch.ones(out, 1),
        f"{module}.lora_down.weight": torch.ones(1, inside) * 0.01,
        f"{module}.alpha": torch.tensor(1.0),
    }
    models = server.base / "models"
    made = [models / "checkpoints" / CHECKPOINT, models / "loras" / LORA]
    sd3_file.write(made[0])
    save_file(lora, made[1])
    yield
    for path in made:
        path.unlink()


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_the_nodes_say_how_a_flow_model_is_sampled(files, browser, client, vue):
    page = new_page(browser, client)
    graph = json.loads(json.dumps(GRAPH))
    graph["6"]["inputs"]["seed"] += vue
    graph["2"]["inputs"]["strength"] += 0.01 * vue  # or the server has its result
    page.evaluate(OPEN, [graph, vue])
    assert page.evaluate(RUN) == "drawn"
    page.wait_for_timeout(1500)
    pictured(page, f"flow-{vue}")
    texts = page.evaluate(TEXTS)
    assert texts["LCMKSampler"] == "hyper-sd3, 4 steps: 1 0.9 0.75 0.5; cfg 3"
    assert texts["LCMLoRALoader"].split("\n") == [
        "hyper-sd3: 1 of 1 modules applied",
        f"from the name {LORA}",
        "the model's own shift: hyper-sd3 sets none",
        "⚠ hyper-sd3 is made for strength 0.125: change strength.",
    ]
    page.evaluate(CHOOSE, ["LCMLoRALoader", "family", "tcd"])
    said = page.evaluate(RUN)
    assert "'tcd' is for Stable Diffusion models, and this MODEL is a flow model (SD3)" in said
    assert not page.wrong and not page.foreign
    page.context.close()


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_a_strength_of_three_decimals_is_kept_and_shown(files, browser, client, vue):
    """Hyper-SD's LoRAs of flow models are made for 0.125."""
    page = new_page(browser, client)
    page.evaluate(OPEN, [GRAPH, vue])
    page.wait_for_timeout(500)
    if vue:
        node = page.locator("[data-node-id='2']")
        box = node.locator("input[value^='0.5']").first
        box.focus()
        box.fill("0.125")
        box.press("Enter")
    else:
        page.evaluate("""() => {
            const node = app.graph.getNodeById(2);
            const strength = node.widgets.find(({ name }) => name === 'strength');
            strength.setValue(0.125, { e: {}, node, canvas: app.canvas });
        }""")
    page.wait_for_timeout(300)
    pictured(page, f"strength-{vue}")
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert prompt["2"]["inputs"]["strength"] == 0.125
    if vue:
        assert node.locator("input[value='0.125']").count() == 1
    page.context.close()
