"""The settings of a distillation: one JSON file, checked before anything is loaded.

This is the place to add one. `training/jobs/order.py` says which of them a user may set in the node
and over HTTP.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from . import disk
from .schema import build, check, declared, setting

# Newer settings. spec.json has them only if they are set.
LATER = ("start_from", "text_encoders", "vae", "offload")


@dataclass(frozen=True)
class Data:
    """Where the clean latents come from."""

    kind: str = setting(
        '"prompts": the teacher draws the latents itself. "pictures": they are encoded.',
        "prompts",
        choices=("prompts", "pictures"),
    )
    path: str = setting(
        "prompts: a UTF-8 text file with one prompt per line, or empty for the list that comes "
        "with the pack. pictures: a folder with captions, a WebDataset tar, or a folder of tars.",
        "",
        is_path=True,
    )
    prompts: tuple[str, ...] = setting("Prompts to use instead of the file.", ())
    count: int = setting(
        "Number of pictures that the checkpoint draws. Later jobs with the same checkpoint, data, "
        "guidance, seed, resolution, precision and style LoRA reuse them.",
        1000,
        least=1,
        widget={"max": 1_000_000},
    )
    draw_steps: int = setting("DDIM steps for each of these pictures.", 25, least=1, most=1000)
    crops: int = setting("Crops from each picture.", 1, least=1, widget={"max": 16})
    flip: bool = setting("Mirror half of the crops.", True)
    skip_limit: float = setting(
        "Share of the pictures that may be unreadable before the job fails.", 0.05, least=0, most=1
    )

    def __post_init__(self) -> None:
        check(self, "data.")
        if self.kind == "pictures" and not self.path:
            raise ValueError("data.path is empty: name the folder of pictures or the tar file.")


@dataclass(frozen=True)
class StyleLoRA:
    """A LoRA that is baked into the teacher before the distillation."""

    path: str = setting("The LoRA file.", is_path=True)
    strength: float = setting("Its weight.", 1.0)


@dataclass(frozen=True)
class Spec:
    """One distillation. Paths are absolute. The job's folder is the one that holds the file.

    The order of the fields is the order in spec.json, whose hash identifies a job: append new ones.
    """

    host: str = setting("ComfyUI's folder.", is_path=True)
    checkpoint: str = setting("The teacher's file.", is_path=True)
    output: str = setting("The LoRA file to write; it ends in .safetensors.", is_path=True)
    banks: str = setting("Folder of the latent banks, which jobs share.", is_path=True)
    host_flags: tuple[str, ...] = setting("ComfyUI's command line flags.", ())
    loras: tuple[StyleLoRA, ...] = setting("Style LoRAs to bake into the teacher first.", ())
    embeddings: tuple[str, ...] = setting(
        "Folders of embeddings. If several have the same name, the first folder counts.",
        (),
        is_path=True,
    )
    overwrite: bool = setting("Replace a LoRA file of the same name.", False)
    data: Data = setting("What the LoRA is distilled from.", factory=Data)
    resolution: int = setting(
        "Size of the pictures, as the side in pixels of a square with the same area: 512 for "
        "SD1.5, 768 for SD2, 1024 for SDXL.",
        512,
        least=64,
        most=4096,
        multiple=8,
        widget={"max": 2048, "step": 64},
    )
    steps: int = setting(
        "Number of optimiser steps. The paper's LoRAs took a few thousand.",
        1000,
        least=1,
        widget={"max": 1_000_000},
    )
    batch: int = setting(
        "Pictures per step. If memory runs out, the batch is halved automatically and gradients "
        "are accumulated.",
        12,
        least=1,
        widget={"max": 1024},
    )
    micro_batch: int = setting(
        "Pictures on the device together; 0 for the whole batch.", 0, least=0
    )
    rank: int = setting("Rank of the LoRA; the paper uses 64.", 64, least=1, widget={"max": 1024})
    alpha: float = setting("Alpha of the LoRA; 0 for alpha = rank.", 0.0, least=0)
    guidance: tuple[float, ...] = setting(
        "The cfg scale that is distilled into the LoRA: the one you use with this model, or "
        "somewhat less, because every sampling step applies it again.",
        (7.5,),
        least=1.0,
        most=30.0,
        expected="one number from 1 to 30, or a range of two",
        widget={"step": 0.1},
    )
    objective: str = setting(
        "What the LoRA learns. lcm: to jump to the picture from any timestep, for 1 to 8 steps. "
        "phased: to imitate the teacher in exactly 4 steps without fresh noise; this is better at "
        "4 steps and worse at any other number. dmd (experimental): first as lcm, then to draw "
        "pictures as likely as the checkpoint's in 1, 2 and 4 steps; a step costs more time and "
        "memory.",
        "lcm",
        choices=("lcm", "phased", "dmd"),
        widget={"optional": True},
    )
    phases: int = setting('Segments of the objective "phased".', 4, least=1, most=50)
    lr: float = setting(
        "Learning rate of AdamW.",
        1e-4,
        above=0,
        most=1.0,
        widget={"min": 1e-7, "step": 1e-6, "round": False},
    )
    warmup: int = setting("Steps in which the learning rate rises.", 0, least=0)
    decay: str = setting(
        "How the learning rate falls: not at all, or to 0 at the end along half a cosine or a "
        "line. The length fit always takes cosine.",
        "constant",
        choices=("constant", "cosine", "linear"),
        widget={"optional": True},
    )
    clip: float = setting("Largest norm of the gradient.", 1.0, above=0)
    precision: str = setting(
        "Precision of the checkpoint in training; auto keeps a flow model's fp8 weights as they "
        "are. The LoRA is float32.",
        "auto",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    checkpointing: str = setting(
        'Recompute blocks in backward to save memory; "auto" when memory runs out.',
        "auto",
        choices=("auto", "on", "off"),
    )
    compile: bool = setting("torch.compile for each block.", False)
    checkpoint_every: int = setting(
        "Steps between the job's checkpoints. A crash loses at most that many.",
        100,
        least=1,
        widget={"max": 1_000_000},
    )
    keep: int = setting("Checkpoints that are kept besides the best one.", 2, least=1)
    log_every: int = setting("Steps between two lines of metrics.jsonl.", 10, least=1)
    sample_every: int = setting(
        "Steps between sample pictures in the tab; 0 draws none.",
        250,
        least=0,
        widget={"max": 1_000_000},
    )
    sample_prompts: tuple[str, ...] = setting(
        "Prompts of the sample pictures; empty for the first four captions of the data.", ()
    )
    patience: int = setting(
        "End the job early when the sample pictures have not come nearer to the data for this many "
        "samplings in a row. The LoRA then comes from the best checkpoint. 0 never ends it early.",
        0,
        least=0,
    )
    seed: int = setting(
        "Random seed of the job. Another seed makes another job.",
        0,
        least=0,
        # A new seed for each prompt would be a new job for each.
        widget={"max": 2**32 - 1, "control_after_generate": False},
    )
    passes: int = setting(
        "Number of passes over the training pictures that share one set of the teacher's outputs, "
        "kept on disk. 8 makes a step about a quarter cheaper; then use a third more steps.",
        1,
        least=1,
        widget={"max": 64, "optional": True},
    )
    start_from: str = setting(
        "A LoRA to start from instead of from nothing: the official LCM-LoRA of this architecture, "
        "or one that you distilled. The job fits it to the checkpoint, at the job's own rank.",
        "",
        is_path=True,
        widget={"optional": True},
    )
    text_encoders: tuple[str, ...] = setting(
        "The files of the text encoders, if `checkpoint` holds only a diffusion model.",
        (),
        is_path=True,
    )
    vae: str = setting("The file of the VAE; needed with text_encoders.", "", is_path=True)
    offload: str = setting(
        "Keep the weights of the network's blocks in the computer's memory, and copy them to the "
        'device whenever a layer is called; "auto" when the device has no room for them.',
        "auto",
        choices=("auto", "on", "off"),
    )

    def __post_init__(self) -> None:
        if bool(self.text_encoders) != bool(self.vae):
            raise ValueError(
                "text_encoders and vae belong together, but only one is set: set both if the "
                "checkpoint holds only a diffusion model, or none if it contains them."
            )
        if self.offload == "on" and (self.checkpointing == "off" or self.compile):
            raise ValueError(
                "offload on recomputes blocks in backward and cannot be compiled: set "
                "checkpointing to auto and compile to false, or offload to auto."
            )
        for name in ("host", "checkpoint", "output", "banks"):
            if not Path(getattr(self, name)).is_absolute():
                raise ValueError(f"{name} must be an absolute path, found {getattr(self, name)!r}.")
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"output must end in .safetensors, found {self.output!r}.")
        check(self)
        w = self.guidance
        is_range = len(w) in (1, 2) and w[0] <= w[-1]
        declared(Spec)["guidance"].setting.require(is_range, "guidance", w)

    @property
    def offloads(self) -> str:
        """`offload`, but "off" for a job that cannot do it."""
        return "off" if self.compile or self.checkpointing == "off" else self.offload

    @property
    def lora_alpha(self) -> float:
        return self.alpha or float(self.rank)

    def to_json(self) -> str:
        """Valid Unicode, from which `read` builds an equal Spec whatever bytes the paths have.

        The hash of this text identifies a job. Newer settings are left out unless they are set, so
        that the jobs of earlier versions keep their hashes.
        """
        settings = asdict(self)
        for name in LATER:
            if settings[name] == declared(Spec)[name].default:
                del settings[name]
        return disk.json_text(json.dumps(settings, indent=1, ensure_ascii=False)) + "\n"


def read(path: Path) -> Spec:
    """The settings in a JSON file.

    Raises ValueError for a setting that is missing, unknown, of another type, or out of range.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no job description {path}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}.") from None
    if isinstance(content, dict):
        if isinstance(content.get("guidance"), int | float):
            content["guidance"] = [content["guidance"]]
        if isinstance(folder := content.get("embeddings"), str):  # written by an older version
            content["embeddings"] = [folder] if folder else []
    return build(Spec, content, path.name)
