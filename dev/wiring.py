"""The pictures of the help pages that show how nodes are wired, taken in the real front end."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from .browser import READY, chromium
from .sheet import Graph, Subject, Wire

# Lays the nodes out from left to right and returns the rectangle that holds them.
LAID_OUT = """async ([prompt, title]) => {
    await app.loadApiJson(prompt, title);
    app.graph.arrange(50);
    await new Promise((done) => setTimeout(done, 500));
    const nodes = app.graph.nodes;
    const wanted = Object.values(prompt).flatMap((node) => Object.values(node.inputs));
    if (app.graph.links.size !== wanted.filter(Array.isArray).length) {
        throw new Error('The prompt has a wire to an input that does not exist.');
    }
    // The 50 pixels above a node hold its title and the pack's name.
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


def vectors(graph: Graph) -> None:
    """Two vectors, combined and saved."""
    lcm, style = graph.vectors()
    _saved(graph, graph.sum(lcm, 1.0, style, 0.8), "lcm-lora-combined")


def extracted(graph: Graph) -> None:
    """The difference between a fast checkpoint and its base, saved."""
    (fast, *_), (base, *_) = graph.checkpoint(), graph.checkpoint()
    vector = graph.wire("LCMLoRAExtract", distilled=fast, base=base, rank=64)
    _saved(graph, vector, "acceleration")


def _saved(graph: Graph, vector: Wire, name: str) -> None:
    graph.add("LCMLoRASave", vector=vector, filename=name, dtype="fp16", overwrite=False)


def patched(graph: Graph) -> None:
    """LCM Model Sampling after a LoRA loader of ComfyUI or another pack."""
    lora = {"lora_name": graph.subject.lcm_lora, "strength_model": 1.0}
    model = graph.wire("LoraLoaderModelOnly", model=graph.checkpoint()[0], **lora)
    graph.add("LCMModelSampling", model=model, family="lcm")


def distilled(graph: Graph) -> None:
    """A job, its data, its status and its LoRA."""
    source = {"source": "prompts", "source.prompts": "", "source.count": 1000}
    data = graph.wire("LCMDistillData", resolution=512, **source, **{"source.draw_steps": 25})
    order = {"checkpoint": graph.subject.checkpoint, "name": "my-lcm-lora"}
    job = graph.wire("LCMDistill", data=data, **order)
    graph.add("LCMJobStatus", job=job)
    graph.add("LCMJobResult", job=job, wait=True)


def stacked(graph: Graph) -> None:
    """A saved vector added to a stack, and the stack as one vector beside the LCM-LoRA."""
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    stack = graph.wire("LCMLoRAToStack", file_name=graph.subject.style_lora, **strengths)
    styles = graph.wire("LCMLoRAFromStack", lora_stack=stack)
    lcm = graph.wire("LCMLoRAVectorLoader", lora_name=graph.subject.lcm_lora)
    graph.sum(styles, 1.0, lcm, 1.0)


WIRINGS = {
    "vectors": vectors, "extracted": extracted, "stacked": stacked, "patched": patched,
    "distilled": distilled,
}  # fmt: skip


def take(name: str, address: str, subject: Subject, file: Path) -> None:
    """Writes the picture of a wiring, taken at the server's address."""
    from playwright.sync_api import sync_playwright

    graph = Graph(subject)
    WIRINGS[name](graph)
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
        picture.convert("RGB").save(file, quality=85)
