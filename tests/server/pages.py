"""Pages of the real front end in Chromium, which note what goes wrong on them."""

import os

from lcm_lora.tests.server.browser import READY

# In an async function of a page: queues its graph; whether the server took it. Some front ends
# answer false for that too.
QUEUED = "(await app.queuePrompt(0, 1), !Object.keys(app.lastNodeErrors ?? {}).length)"
TEMPLATES = "/api/workflow_templates/lcm-lora"


def new_page(browser, client):
    """.wrong: errors of the page so far; .foreign: addresses of others that it asked for."""
    client.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "9.9.9"})
    page = browser.new_context(viewport={"width": 1600, "height": 900}).new_page()
    page.wrong, page.foreign = [], []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: foreign(page, client, request.url))
    opened(page, client)
    return page


def files_here(subject) -> dict[str, str]:
    """The files that are here, by the names in the shipped workflows."""
    return {
        "v1-5-pruned-emaonly-fp16.safetensors": subject.checkpoint,
        "lcm-lora-sdv1-5.safetensors": subject.lcm_lora,
        "sd_xl_base_1.0.safetensors": subject.checkpoint,
        "lcm-lora-sdxl.safetensors": subject.lcm_lora,
        "papercut.safetensors": subject.style_lora,
        "crayons_v1_sdxl.safetensors": subject.style_lora,
        # The models of flow workflows are here by name: see flow_files.
        "Qwen-Image-Lightning-4steps-V1.0.safetensors": subject.lcm_lora,
        "Hyper-FLUX.1-dev-8steps-lora.safetensors": subject.lcm_lora,
        "gummycandy_qwen.safetensors": subject.style_lora,
        "pixel_art_style_z_image_turbo.safetensors": subject.style_lora,
        "flux_dev_frostinglane_araminta_k.safetensors": subject.style_lora,
    }


def open_template(page, subject, stem) -> None:
    """Opens a shipped workflow as one who has its files."""
    page.evaluate(
        """async ([address, files, name]) => {
            let text = await (await fetch(address)).text();
            for (const [official, own] of files) text = text.replaceAll(official, own);
            await app.loadGraphData(JSON.parse(text), true, true, name);
        }""",
        [f"{TEMPLATES}/{stem}.json", list(files_here(subject).items()), stem],
    )


def foreign(page, client, address: str) -> None:
    if not address.startswith((client.url, "data:", "blob:", client.url.replace("http", "ws"))):
        page.foreign.append(address)


def opened(page, client) -> None:
    page.goto(client.url)
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(1000)


def pictured(page, name) -> None:
    """Keeps a screenshot where the developer asked for them."""
    if folder := os.environ.get("LCM_LORA_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")
