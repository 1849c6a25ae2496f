"""Jobs as ComfyUI's server has them: where they lie, and how a user's words become one.

A user names things as the host lists them, in nodes and over HTTP alike; every path is made here.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import folder_paths
import torch
from comfy import model_management
from comfy.utils import ProgressBar

from ...lora.acceleration import FAMILY
from ...lora.blocks import place_of
from ...lora.delta import Vector
from ...lora.files import inside, read
from ..cluster import settings
from ..cluster.settings import Cluster
from ..export import vector, with_styles
from ..spec import Data, Spec, StyleLoRA
from ..spec import read as read_spec
from ..state import checkpoints
from . import supervisor
from .records import on_cluster
from .store import Job, Store

POLICIES = ("yield", "exclusive", "share")

SOURCES = ("prompts", "prompt file", "pictures")
# The server's own flags that decide how a model is loaded and computed: alone, or with a value.
FLAGS = (
    "--cpu", "--force-fp32", "--force-fp16", "--fp32-unet", "--bf16-unet", "--fp16-unet",
    "--fp16-vae", "--fp32-vae", "--bf16-vae", "--cpu-vae", "--fp16-text-enc", "--fp32-text-enc",
    "--force-upcast-attention", "--dont-upcast-attention", "--force-channels-last",
    "--deterministic", "--lowvram", "--novram", "--highvram",
)  # fmt: skip
VALUED_FLAGS = ("--directml", "--oneapi-device-selector", "--reserve-vram", "--default-device")
MOST_PROMPTS, LONGEST_PROMPT = 10_000, 2_000
LOOK = 0.5  # seconds between looks at a job that a prompt waits for
_stores: dict[Path, Store] = {}
waiting: list[str] = []
"""Ids of the jobs that a running prompt waits for: they must not step aside for it."""


@dataclass(frozen=True)
class Source:
    """What LCM_DATA carries: where the clean latents come from, in the user's words.

    Attributes:
        kind: "prompts", "prompt file" or "pictures".
        prompts: one a line; empty for the list that the pack brings.
        path: a text file, a folder of pictures, or a tar, inside the host's input folder.
        count, draw_steps: latents the teacher draws from prompts, and its DDIM steps of each.
        crops, flip: of each picture. resolution: side of a square of the pictures' area, pixels.
    """

    kind: str = "prompts"
    prompts: str = ""
    path: str = ""
    count: int = 1000
    draw_steps: int = 25
    crops: int = 1
    flip: bool = True
    resolution: int = 512


@dataclass(frozen=True)
class Order:
    """A distillation as a user asks for it. Names are those of the host's lists.

    Attributes:
        checkpoint: the teacher. name: of the LoRA to make, as `name` or `folder/name`.
        style_lora, style_strength: baked into the teacher first; "" for none.
        device: numbers of the devices to train on, such as "0" or "0,1"; "" for the first; "ray" or
            "ray:4" for so many workers of the cluster in ray.json.
        policy: beside the graph, see Job. The others are those of Spec.
    """

    checkpoint: str
    name: str
    data: Source = field(default_factory=Source)
    steps: int = 1000
    batch: int = 12
    rank: int = 64
    guidance: float = 7.5
    lr: float = 1e-4
    seed: int = 0
    precision: str = "auto"
    checkpoint_every: int = 100
    sample_every: int = 250
    style_lora: str = ""
    style_strength: float = 1.0
    policy: str = "yield"
    device: str = ""
    overwrite: bool = False
    objective: str = "lcm"
    passes: int = 1


def store() -> Store:
    """The jobs of this server's user folder."""
    folder = Path(folder_paths.get_system_user_directory("lcm_lora")) / "jobs"
    return _stores.setdefault(folder, Store(folder))


def start(order: Order) -> tuple[str, bool]:
    """Queues what is ordered and sees that somebody works on the queue; -> (id, whether it is new).

    Raises ValueError for a name that the host does not list, a path outside its folders, a value
    out of range, or a LoRA's name that is taken.
    """
    if order.policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, found {order.policy!r}.")
    jobs = store()
    device, count = _devices(order.device, jobs.folder.parent / settings.FILE)
    spec = _spec(order, jobs.folder.parent / "banks")
    name = str(Path(spec.output).relative_to(_loras()).with_suffix(""))
    queued = jobs.create(spec, name, device, count, order.policy, _visible(device))
    work()
    return queued


def _devices(device: str, cluster: Path) -> tuple[str, int]:
    """(what a user calls a device, in one spelling; how many processes train on it).

    Raises ValueError for a device that is not there, or that is named twice.
    """
    if not re.fullmatch(r"(\d{1,3}(,\d{1,3})*)?|ray(:[1-9]\d{0,2})?", device):
        raise ValueError(
            'device must be empty, numbers of devices such as "0" or "0,1", or "ray" or "ray:4" '
            f"for so many workers of your Ray cluster, found {device!r}."
        )
    if on_cluster(device):
        Cluster.read(cluster)
        return device, int(device.partition(":")[2] or 1)
    numbers, there = [int(number) for number in device.split(",") if number], len(_there())
    if missing := [number for number in numbers if number >= there]:
        known = {0: "PyTorch finds none here", 1: "there is one here, 0"}
        known = known.get(there, f"there are {there} here, 0 to {there - 1}")
        raise ValueError(f"There is no device {missing[0]}: {known}.")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"device names one device twice: {device!r}.")
    return ",".join(map(str, numbers)), max(1, len(numbers))


def _there() -> list[str]:
    """The devices that jobs can choose, as the driver calls them, in the order of their numbers.

    Those that this server sees, whatever hides the others: CUDA_VISIBLE_DEVICES, which ComfyUI's
    --cuda-device sets, or HIP_VISIBLE_DEVICES. [""] for the only one of another kind.
    """
    flags = _flags()
    other = torch.backends.mps.is_available() or torch.xpu.is_available()
    if other or any(flag == "--cpu" or flag.startswith("--directml") for flag in flags):
        return [""]
    count = torch.cuda.device_count()
    names = os.environ.get("HIP_VISIBLE_DEVICES") if torch.version.hip else None
    names = names or os.environ.get("CUDA_VISIBLE_DEVICES") or ""
    shown = [name.strip() for name in names.split(",") if name.strip()][:count]
    return shown if len(shown) == count else list(map(str, range(count)))


def _visible(device: str) -> str:
    """What a job's CUDA_VISIBLE_DEVICES must be, "" to leave it."""
    if on_cluster(device):
        return ""
    there = _there() or [""]
    return ",".join(there[int(number)] for number in (device or "0").split(","))


def work() -> None:
    """Makes sure that a supervisor runs. Takes milliseconds, or seconds if one is just ending."""
    supervisor.ensure(store().folder)


def result(identifier: str, wait: bool, show: Callable[[str], None]) -> tuple[Vector, str]:
    """(the LoRA of a job, its name in ComfyUI's list). For a job that is not done: the LoRA of its
    newest checkpoint, and "".

    Raises NoJob for an unknown job, and ValueError if there is no LoRA yet, or if the job that is
    waited for fails or is paused.

    Args:
        wait: first wait until the job is done. show: is called with lines about the progress.
    """
    job = store().job(identifier)
    if wait and job.state != "done":
        job = _done(job, show)
    if job.lora_name is not None:
        file = Path(folder_paths.get_full_path_or_raise("loras", job.lora_name))
        return read(file), job.lora_name
    newest = checkpoints.newest(store().checkpoints(identifier))
    if newest is None:
        raise ValueError(f"The job {job.name!r} has no checkpoint yet: {job.progress()}.")
    spec = read_spec(store().path(identifier) / "spec.json")
    source = f"{job.name}, step {newest.step}"
    made = vector(newest.adapter, spec.lora_alpha, {FAMILY: spec.objective}, source)
    show(f"The LoRA after step {newest.step}")
    return with_styles(made, [_style(lora) for lora in spec.loras]), ""


def _done(job: Job, show: Callable[[str], None]) -> Job:
    """Waits until the job is done. Raises ValueError if it fails or is paused by a user."""
    if not job.on_cluster and job.policy != "share":
        # The server unloads models between prompts only, and this prompt lasts as long as the job.
        model_management.unload_all_models()
        model_management.soft_empty_cache()
    bar = ProgressBar(max(1, job.steps))
    waiting.append(job.id)
    try:
        while job.state != "done":
            model_management.throw_exception_if_processing_interrupted()
            if job.state == "failed" or (job.state == "paused" and not job.aside):
                raise ValueError(f"The job {job.name!r} is {job.progress()}.")
            bar.update_absolute(job.step, max(1, job.steps))
            show(job.progress())
            time.sleep(LOOK)
            job = store().job(job.id)
    finally:
        waiting.remove(job.id)
    return job


def _style(lora: StyleLoRA) -> tuple[Vector, float]:
    """The part of a style that the teacher took over, the one for the model, and its strength."""
    style = read(Path(lora.path))
    return style.only({m for m in style.modules() if place_of(m) != "text"}), lora.strength


def _spec(order: Order, banks: Path) -> Spec:
    styles = ()
    if order.style_lora:
        styles = (StyleLoRA(_listed("loras", order.style_lora), order.style_strength),)
    return Spec(
        host=str(Path(folder_paths.__file__).resolve().parent), host_flags=_flags(),
        checkpoint=_listed("checkpoints", order.checkpoint), loras=styles,
        embeddings=tuple(map(os.path.abspath, folder_paths.get_folder_paths("embeddings"))),
        output=str(inside(_loras(), order.name)), overwrite=order.overwrite, banks=str(banks),
        data=_data(order.data), resolution=order.data.resolution, steps=order.steps,
        batch=order.batch, rank=order.rank, guidance=(order.guidance,), lr=order.lr,
        seed=order.seed, precision=order.precision, checkpoint_every=order.checkpoint_every,
        sample_every=order.sample_every, objective=order.objective, passes=order.passes,
    )  # fmt: skip


def _data(source: Source) -> Data:
    if source.kind not in SOURCES:
        raise ValueError(f"kind must be one of {', '.join(SOURCES)}, found {source.kind!r}.")
    prompts = tuple(line.strip() for line in source.prompts.splitlines() if line.strip())
    longest = max(map(len, prompts), default=0)
    if len(prompts) > MOST_PROMPTS or longest > LONGEST_PROMPT:
        raise ValueError(
            f"There are {len(prompts)} prompts, the longest of {longest} characters; at most "
            f"{MOST_PROMPTS} of {LONGEST_PROMPT} are taken here. Use a prompt file."
        )
    used = {"prompts": (), "path": ""}
    if source.kind == "prompts":
        used["prompts"] = prompts
    else:
        used["path"] = _given(source.path)
    return Data(
        kind="pictures" if source.kind == "pictures" else "prompts", count=source.count,
        draw_steps=source.draw_steps, crops=source.crops, flip=source.flip, **used,
    )  # fmt: skip


def _given(name: str) -> str:
    """Path of what a user put into the host's input folder, a link to elsewhere perhaps."""
    base = Path(os.path.abspath(folder_paths.get_input_directory()))
    path = Path(os.path.normpath(base / name))
    if not name.strip() or not path.is_relative_to(base) or path == base:
        raise ValueError(f"{name!r} is not inside ComfyUI's input folder, where it must lie.")
    if not path.exists():
        raise ValueError(f"There is no {name!r} in ComfyUI's input folder.")
    return str(path)


def _listed(kind: str, name: str) -> str:
    """Path of a file that the host offers under this name."""
    if name not in folder_paths.get_filename_list(kind):
        raise ValueError(f"ComfyUI lists no {name!r} among its {kind}.")
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise ValueError(f"The file of {name!r} is gone, though ComfyUI lists it.")
    # As it is called there: what a link leads to may have no suffix, which tells how to read it.
    return os.path.abspath(path)


def _loras() -> Path:
    return Path(folder_paths.get_folder_paths("loras")[0]).resolve()


def _flags() -> tuple[str, ...]:
    """Those of this server's flags that its jobs get too."""
    given, kept = sys.argv[1:], []
    for i, flag in enumerate(given):
        if flag in FLAGS:
            kept.append(flag)
        elif flag in VALUED_FLAGS:  # --directml may be without one
            kept += [flag, *(word for word in given[i + 1 : i + 2] if not word.startswith("-"))]
        elif flag.startswith(tuple(f"{valued}=" for valued in VALUED_FLAGS)):
            kept.append(flag)
    return tuple(kept)
