"""The peak memory of Compare Settings beside that of LCM KSampler, on SDXL at its full size.

Both have random weights in bfloat16 and two LoRAs, of rank 64 and 32, and decode with the demo
model's VAE. Each runs in a process of its own: LCM KSampler draws one picture with the LoRAs merged
by Apply LoRA Vector, the sheet a 2 x 2 grid of their weights. The sheet's batches are as large as
the free memory allows, up to 8 pictures, so it is measured with one picture a batch as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from .. import commands, in_process
from . import networks
from .merge import factors, layers
from .report import Report
from .timing import Process

RANKS = (64, 32)
STEPS = 1
SHEET, ALONE, PICTURE = "sheet", "sheet, a picture a batch", "LCM KSampler"
LIMIT = 1.05


@dataclass(frozen=True)
class Case:
    """host, base: folders, of ComfyUI and of what it writes. side: of the latents."""

    host: Path
    base: Path
    checkpoint: Path
    loras: Path
    side: int
    way: str


def add(report: Report, side: int) -> None:
    """Adds the rows and the bar. Takes about 15 GB."""
    import comfy

    from ..toy import assemble

    folder = commands.LOCAL / "sheet-memory"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = layers("SDXL")
    for number, rank in enumerate(RANKS):
        tensors = {}
        for name, shape in shapes.items():
            up, down = factors(shape, rank, generator)
            tensors[f"diffusion_model.{name}.lora_up.weight"] = up.half() * 0.01
            tensors[f"diffusion_model.{name}.lora_down.weight"] = down.half()
        save_file(tensors, folder / f"{number}.safetensors")
    host, title = Path(comfy.__path__[0]).parent, f"SDXL {8 * side}px bf16, {STEPS} step"
    peaks = {}
    for way in (PICTURE, ALONE, SHEET):
        case = Case(host, folder / "base", assemble.checkpoint(), folder, side, way)
        process = Process(prepare, case)
        try:
            taken = process()
        finally:
            process.close()
        peaks[way] = taken.peak
        report.add(title, way, "peak memory", "GB", [taken.peak / 1e9])
        report.add(title, way, "before the first run", "GB", [process.start / 1e9])
        report.add(title, way, "wall", "s", [taken.seconds])
    report.bar(f"{title}: peak memory, {ALONE} / {PICTURE}", peaks[ALONE] / peaks[PICTURE], LIMIT)
    shutil.rmtree(folder)


def prepare(case: Case) -> Callable[[], None]:
    """The function that draws, in a process of its own."""
    in_process.enter(case.host, case.base)
    import comfy.sd

    from ...lora.formats.files import read_named
    from ...lora.formats.wire import to_wire
    from ...lora.host import apply
    from ...nodes.compare import draw
    from ...nodes.compare.node import LCMCompare
    from ...nodes.sampling import LCMKSampler
    from ...samplers.host import patch_sampling

    weights = networks.host_unet(networks.ARCHITECTURES["SDXL"], "cpu", torch.bfloat16).state_dict()
    model = comfy.sd.load_diffusion_model_state_dict(
        weights, model_options={"dtype": torch.bfloat16}
    )
    model.model.manual_cast_dtype = torch.bfloat16  # on a CPU, ComfyUI would multiply in float32
    vae = comfy.sd.load_checkpoint_guess_config(
        str(case.checkpoint), output_clip=False, output_model=False
    )[2]
    files = [case.loras / f"{number}.safetensors" for number in range(len(RANKS))]
    vectors = [read_named(file, file.name) for file in files]
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(1, 1280, generator=generator)
    text = [[torch.randn(1, 77, 2048, generator=generator), {"pooled_output": pooled}]]
    latent = {"samples": torch.zeros(1, 4, case.side, case.side)}

    def picture() -> None:
        merged = model
        for vector, weight in zip(vectors, (1.0, 0.8), strict=True):
            merged = apply(merged, None, vector, weight, 0.0)[0]
        output = LCMKSampler.execute(patch_sampling(merged), 7, STEPS, 1.0, text, text, latent, 1.0)
        vae.decode(output.result[0]["samples"])

    def sheet() -> None:
        one, two = map(to_wire, vectors)
        count = {"count": "2", "vector_1": one, "weight_1": 1.0, "vector_2": two, "weight_2": 0.8}
        axes = [
            {name: "weight", "values": values, "vector": number}
            for name, values, number in (("columns", "0.8, 1.0", 1), ("rows", "0.4, 0.8", 2))
        ]
        LCMCompare.execute(
            model, vae, latent, count, *axes, 7, STEPS, 1.0, 1.0, positive=text, negative=text
        )

    if case.way == ALONE:
        draw.MOST_TOGETHER = 1
    drawing = torch.inference_mode()(picture if case.way == PICTURE else sheet)
    return drawing
