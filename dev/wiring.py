"""The pictures of the help pages that show how nodes are wired, taken in the real front end."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from .browser import READY, chromium
from .sheet import Graph, Subject

# Left to right by how far a node is from the beginning, as people lay them out.
LAID_OUT = """async ([prompt, title]) => {
    await app.loadApiJson(prompt, title);
    app.graph.arrange(50);
    await new Promise((done) => setTimeout(done, 500));
    const nodes = app.graph.nodes;
    const wanted = Object.values(prompt).flatMap((node) => Object.values(node.inputs));
    if (app.graph.links.size !== wanted.filter(Array.isArray).length) {
        throw new Error('a wire of the prompt has no input of that name');
    }
    // The 50 above a node have its title and the pack's name.
    const edge = (pick, of) => pick(...nodes.map(of));
    const left = edge(Math.min, (n) => n.pos[0]), top = edge(Math.min, (n) => n.pos[1] - 50);
    const right = edge(Math.max, (n) => n.pos[0] + n.size[0]);
    const bottom = edge(Math.max, (n) => n.pos[1] + n.size[1]);
    const view = app.canvas.ds;
    view.scale = 1;
    view.offset[0] = 120 - left;
    view.offset[1] = 120 - top;
    app.canvas.setDirty(true, true);
    await new Promise((done) => setTimeout(done, 500));
    const { x, y } = app.canvas.canvas.getBoundingClientRect();
    return { x: x + 110, y: y + 110, width: right - left + 20, height: bottom - top + 20 };
}"""


def vectors(graph: Graph, subject: Subject) -> None:
    """Two vectors, combined and saved."""
    lcm, style = graph.vectors(subject)
    both = graph.sum(lcm, 1.0, style, 0.8)
    graph.add(
        "LCMLoRASave", vector=both, filename="lcm-lora-combined", dtype="fp16", overwrite=False
    )


def extracted(graph: Graph, subject: Subject) -> None:
    """A fast checkpoint less its base, saved."""
    fast, base = (
        [graph.add("CheckpointLoaderSimple", ckpt_name=subject.checkpoint), 0] for _ in range(2)
    )
    vector = graph.add("LCMLoRAExtract", distilled=fast, base=base, rank=64)
    graph.add(
        "LCMLoRASave", vector=[vector, 0], filename="acceleration", dtype="fp16", overwrite=False
    )


def patched(graph: Graph, subject: Subject) -> None:
    """The sampling set after another pack's or ComfyUI's own loader."""
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=subject.checkpoint)
    lora = graph.add(
        "LoraLoaderModelOnly", model=[checkpoint, 0], lora_name=subject.lcm_lora, strength_model=1.0
    )
    graph.add("LCMModelSampling", model=[lora, 0], family="lcm")


def distilled(graph: Graph, subject: Subject) -> None:
    """Data, job, its state, and its LoRA applied."""
    source = {"source": "prompts", "source.prompts": "", "source.count": 1000}
    data = graph.add("LCMDistillData", resolution=512, **source, **{"source.draw_steps": 25})
    job = graph.add("LCMDistill", checkpoint=subject.checkpoint, data=[data, 0], name="my-lcm-lora")
    graph.add("LCMJobStatus", job=[job, 0])
    graph.add("LCMJobResult", job=[job, 0], wait=True)


def stacked(graph: Graph, subject: Subject) -> None:
    """A saved vector put into a stack, and the stack as one vector beside the LCM-LoRA."""
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    stack = graph.add("LCMLoRAToStack", file_name=subject.style_lora, **strengths)
    styles = graph.add("LCMLoRAFromStack", lora_stack=[stack, 0])
    lcm = graph.add("LCMLoRAVectorLoader", lora_name=subject.lcm_lora)
    graph.sum([styles, 0], 1.0, [lcm, 0], 1.0)


WIRINGS = {
    "vectors": vectors, "extracted": extracted, "stacked": stacked, "patched": patched,
    "distilled": distilled,
}  # fmt: skip


def take(name: str, address: str, subject: Subject, folder: Path) -> None:
    """Writes the picture of that wiring into the folder."""
    from playwright.sync_api import sync_playwright

    graph = Graph()
    WIRINGS[name](graph, subject)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 2200, "height": 1400})
        page.goto(address)
        page.wait_for_function(READY, timeout=120_000)
        page.wait_for_timeout(2000)
        frame = page.evaluate(LAID_OUT, [graph.nodes, name])
        shot = page.screenshot(clip=frame)
        browser.close()
    with Image.open(io.BytesIO(shot)) as picture:
        picture.convert("RGB").save(folder / f"{name}.jpg", quality=85)
