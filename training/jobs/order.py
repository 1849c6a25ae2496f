"""A distillation as a user orders it, in a node or over HTTP: files by their names in ComfyUI.

Settings that are a Spec's own are declared in training/spec.py and named here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..schema import check, declared, same, setting
from ..spec import Data, Spec

POLICIES = ("yield", "exclusive", "share")
SOURCES = ("prompts", "prompt file", "pictures")
CUSTOM = "custom"


@dataclass(frozen=True)
class Length:
    """The settings that a choice of `length` stands for.

    steps: of the optimiser. drawn: the most pictures that the job draws; None for no limit.
    decay: of the learning rate; "" for the order's own. fits: whether the job needs a LoRA to start
    from.
    """

    steps: int
    drawn: int | None = None
    decay: str = ""
    fits: bool = False

    def sets(self, order: dict[str, Any]) -> dict[str, Any]:
        """What it changes in an order, as fields of Order; `data` as a dict."""
        data = order["data"]
        count = min(data["count"], self.drawn or data["count"])
        return {
            "length": CUSTOM, "steps": self.steps, "decay": self.decay or order["decay"],
            "data": data | {"count": count},
        }  # fmt: skip


# good is the length of the measurements in docs/measured.md, best that of the paper's LoRAs, and
# fit that of docs/paper.md. With prompts, counted in network calls, try takes 0.22 times as long as
# good, fit 0.19 times, and best 2.7 times.
LENGTHS = {
    "try": Length(200, 250),
    "good": Length(1000),
    "best": Length(4000),
    "fit": Length(150, 250, "cosine", fits=True),
}


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The content of LCM_DATA: where the clean latents come from."""

    kind: str = setting(
        "prompts: the checkpoint draws the pictures. pictures: your own, with captions.",
        "prompts",
        choices=SOURCES,
    )
    prompts: str = setting(
        "One prompt per line. Leave it empty to use the list that comes with the pack.",
        "",
        widget={"multiline": True},
    )
    path: str = setting(
        "A text file, a folder of pictures or a tar file in ComfyUI's input folder.",
        "",
        is_path=True,
    )
    count: int = same(Data, "count")
    draw_steps: int = same(Data, "draw_steps")
    crops: int = same(Data, "crops")
    flip: bool = same(Data, "flip")
    resolution: int = same(Spec, "resolution")
    auto_resolution: bool = setting(
        "Use the resolution that the checkpoint's architecture is made for instead of the number "
        "above: 512 for SD1.5, 512 or 768 for SD2, 640 for Wan, 1024 for SDXL, its relatives and "
        "the other flow models.",
        False,
        widget={"optional": True},
    )

    def __post_init__(self) -> None:
        check(self, "data.")


@dataclass(frozen=True, kw_only=True)
class TeacherOrder:
    """The content of LCM_TEACHER: a flow model by the files of its parts. Empty: not used."""

    diffusion_model: str = setting(
        "The model to accelerate: a flow model (SD3, Flux, Chroma, Flux2, Qwen-Image, Z-Image, "
        "Lumina2, Anima or Wan) from ComfyUI's diffusion_models folder, with weights in bf16, "
        "fp16, fp32 or fp8.",
        "",
        is_path=True,
    )
    text_encoder: str = setting(
        "The model's text encoder. ComfyUI recognises its kind from the file and the model.",
        "",
        is_path=True,
    )
    text_encoder_2: str = setting(
        "Its second text encoder, such as CLIP-L beside T5-XXL for Flux.", "", is_path=True
    )
    text_encoder_3: str = setting("Its third text encoder, for SD3.", "", is_path=True)
    vae: str = setting("The model's VAE.", "", is_path=True)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        names = self.text_encoder, self.text_encoder_2, self.text_encoder_3
        return tuple(name for name in names if name)

    def __post_init__(self) -> None:
        if not self.diffusion_model and not self.text_encoders and not self.vae:
            return
        needed = {
            "a diffusion model": self.diffusion_model, "a text encoder": self.text_encoder,
            "a VAE": self.vae,
        }  # fmt: skip
        if missing := [what for what, name in needed.items() if not name]:
            raise ValueError(f"Distillation Teacher lacks {' and '.join(missing)}.")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A distillation. The node's inputs have the order of the fields, so append new fields."""

    checkpoint: str = setting(
        "The model to accelerate: SD1.5, SD2, SDXL, SSD-1B, Vega, KOALA, or a flow model (SD3, "
        "Flux, Qwen-Image, Z-Image and others) in one file with text encoders and VAE. Choose none "
        "if the model comes from Distillation Teacher.",
        is_path=True,
    )
    data: DataOrder = setting("The data from Distillation Data.", factory=DataOrder)
    name: str = setting(
        "File name in the loras folder. For a subfolder, write folder/name.",
        widget={"default": "my-lcm-lora"},
    )
    steps: int = same(Spec, "steps")
    batch: int = same(Spec, "batch")
    rank: int = same(Spec, "rank")
    guidance: float = same(Spec, "guidance", Spec.guidance[0])
    lr: float = same(Spec, "lr")
    seed: int = same(Spec, "seed")
    precision: str = same(Spec, "precision")
    policy: str = setting(
        "What happens while you generate. yield: the job saves and ends, and resumes when the "
        "queue is empty; ComfyUI unloads its models each time the job starts. exclusive: the job "
        "keeps training; ComfyUI unloads its models when the job starts and each time the queue "
        "becomes empty. share: the job keeps training, and ComfyUI does not unload its models.",
        "yield",
        choices=POLICIES,
    )
    style_lora: str = setting(
        "A style LoRA to bake into the checkpoint first. You get an accelerated style in one file.",
        "",
        is_path=True,
    )
    style_strength: float = setting(
        "Weight of that style.", 1.0, widget={"min": -10.0, "max": 10.0, "step": 0.01}
    )
    sample_every: int = same(Spec, "sample_every")
    checkpoint_every: int = same(Spec, "checkpoint_every")
    device: str = setting(
        'GPU numbers, such as "1" or "0,1"; leave it empty for the first GPU. "ray" uses one '
        'worker of your Ray cluster, and "ray:4" uses four.',
        "",
        pattern="([0-9]{1,3}(,[0-9]{1,3})*)?|ray(:[1-9][0-9]{0,2})?",
        expected='empty, numbers of devices such as "0" or "0,1", or "ray" or "ray:4" for so many '
        "workers of your Ray cluster",
    )
    overwrite: bool = same(Spec, "overwrite")
    objective: str = same(Spec, "objective")
    passes: int = same(Spec, "passes")
    length: str = setting(
        "How long to train. try: 200 steps and at most 250 drawn pictures, to see that it works; "
        "about a quarter of the time of good. good: 1000 steps, with which the demo model was "
        "measured. best: 4000 steps, like the paper's LoRAs; about three times the time of good. "
        "fit: 150 steps and at most 250 drawn pictures, to fit the LoRA in start_from to this "
        "checkpoint; about a fifth of the time of good. custom: as many steps as the input steps "
        "says.",
        CUSTOM,
        choices=(CUSTOM, *LENGTHS),
        widget={"optional": True},
    )

    sample_prompts: str = setting(
        "One prompt per line for the sample pictures, at most 8. Leave it empty to use the first "
        "four prompts or captions of the data.",
        "",
        widget={"multiline": True, "optional": True},
    )
    start_from: str = same(Spec, "start_from")
    teacher: TeacherOrder = setting(
        "The files of a flow model, from Distillation Teacher. They replace the checkpoint, which "
        "is then not read.",
        factory=TeacherOrder,
        widget={"optional": True},
    )
    decay: str = same(Spec, "decay")

    def __post_init__(self) -> None:
        check(self)
        if self.length in LENGTHS and LENGTHS[self.length].fits and not self.start_from:
            raise ValueError(
                f"The length {self.length} fits an existing LoRA to the checkpoint, but start_from "
                "names none: choose the official LCM-LoRA of the checkpoint's architecture there, "
                "or another length."
            )

    def with_length(self) -> Order:
        """The order with what its length sets, as a custom one."""
        chosen = LENGTHS.get(self.length)
        if chosen is None:
            return self
        changes = chosen.sets(asdict(self))
        return replace(self, **changes | {"data": replace(self.data, **changes["data"])})


def again(order: dict[str, Any], steps: int) -> dict[str, Any]:
    """The order of a job's folder, changed so that it gives a job of `steps` steps. A job that was
    trained for more steps has more than its length says."""
    chosen = LENGTHS.get(order.get("length", CUSTOM))
    if chosen is None:
        return order | {"steps": steps}
    if chosen.steps == steps:
        return order
    complete = {"decay": declared(Order)["decay"].default} | order
    return complete | chosen.sets(complete) | {"steps": steps}
