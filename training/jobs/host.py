"""Jobs in ComfyUI's server: finds them, turns orders into jobs, and reads their LoRAs.

Users name files as ComfyUI lists them, in nodes and over HTTP. Only this file turns names into
paths.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy import model_management
from comfy.utils import ProgressBar

from ...lora.blocks import place_of
from ...lora.delta import Vector
from ...lora.formats.describe import public
from ...lora.formats.facts import plain
from ...lora.formats.filenames import inside, offered
from ...lora.formats.files import read, write
from .. import disk
from ..checkpoint_file import CheckpointFile
from ..cluster.settings import Cluster
from ..export import family_metadata, vector, with_styles
from ..schema import shared
from ..spec import Data, Spec, StyleLoRA
from ..spec import read as read_spec
from ..state import checkpoints
from . import supervisor
from .estimate import Estimate
from .estimate import estimate as estimated
from .job import Job
from .order import DataOrder, Order
from .records import on_cluster
from .store import Store

# ComfyUI's own flags that decide how a model is loaded and computed: alone, or with a value.
FLAGS = (
    "--cpu", "--force-fp32", "--force-fp16", "--fp32-unet", "--bf16-unet", "--fp16-unet",
    "--fp16-vae", "--fp32-vae", "--bf16-vae", "--cpu-vae", "--fp16-text-enc", "--fp32-text-enc",
    "--force-upcast-attention", "--dont-upcast-attention", "--force-channels-last",
    "--deterministic", "--lowvram", "--novram", "--highvram",
)  # fmt: skip
VALUED_FLAGS = ("--directml", "--oneapi-device-selector", "--reserve-vram", "--default-device")
MOST_PROMPTS, LONGEST_PROMPT = 10_000, 2_000
MOST_SAMPLES = 8  # sample pictures of a step, each drawn at 1, 2 and 4 steps
LOOK = 0.5  # seconds between looks at a job that a prompt waits for
_stores: dict[Path, Store] = {}
waiting: list[str] = []
"""Ids of the jobs that a running prompt waits for. They must not pause for that prompt."""


def store() -> Store:
    """The jobs of this server's user folder."""
    folder = Path(folder_paths.get_system_user_directory("lcm_lora")) / "jobs"
    return _stores.setdefault(folder, Store(folder))


def start(order: Order, workflow: Any = None) -> tuple[str, bool, Spec]:
    """Queues a job and makes sure that a supervisor runs; -> (its id, whether it is new, its
    settings).

    workflow: the graph that ordered it, as ComfyUI saves graphs; None for an order over HTTP.

    Raises ValueError for a name that ComfyUI does not list, a path outside its folders, a device
    that does not exist, or a LoRA's name that is taken.
    """
    jobs = store()
    device, count = _devices(order.device, jobs.folder.parent / Cluster.FILE)
    spec = _spec(order, jobs.folder.parent / "banks")
    name = _name(spec)
    text = disk.json_text(json.dumps(asdict(order), indent=1, ensure_ascii=False))
    graph = disk.json_text(json.dumps(workflow, ensure_ascii=False)) if workflow else ""
    made, is_new = jobs.create(
        spec, name, device, count, order.policy, _visible(device), text, graph
    )
    work()
    return made, is_new, spec


def estimate(order: Order) -> Estimate:
    """What a job will take. Raises as `start`, but the LoRA's name may be taken."""
    jobs = store()
    device, count = _devices(order.device, jobs.folder.parent / Cluster.FILE)
    spec = _spec(order, jobs.folder.parent / "banks")
    return estimated(spec, _name(spec), device, count, jobs)


def _name(spec: Spec) -> str:
    """The LoRA's name, as loaders show it without its suffix."""
    return str(Path(spec.output).relative_to(_loras()).with_suffix(""))


def _devices(device: str, cluster: Path) -> tuple[str, int]:
    """(the device in one spelling, how many processes train on it).

    Raises ValueError for a device that does not exist or is named twice.
    """
    if on_cluster(device):
        Cluster.read(cluster)
        return device, int(device.partition(":")[2] or 1)
    numbers, available = [int(number) for number in device.split(",") if number], len(_available())
    if missing := [number for number in numbers if number >= available]:
        counts = {0: "PyTorch finds none here", 1: "there is one here, 0"}
        count = counts.get(available, f"there are {available} here, 0 to {available - 1}")
        raise ValueError(f"There is no device {missing[0]}: {count}.")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"device names one device twice: {device!r}.")
    return ",".join(map(str, numbers)), max(1, len(numbers))


def _available() -> list[str]:
    """The driver's names of the devices that jobs can choose, in the order of their numbers.

    These are the ones that this server sees: CUDA_VISIBLE_DEVICES, which ComfyUI's --cuda-device
    sets, or HIP_VISIBLE_DEVICES may hide others. [""] for the only device of another kind.
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
    available = _available() or [""]
    return ",".join(available[int(number)] for number in (device or "0").split(","))


def work() -> None:
    """Makes sure that a supervisor runs. Takes milliseconds, or seconds if one is just ending."""
    supervisor.ensure(store().folder)


def result(identifier: str, wait: bool, show: Callable[[Job], None]) -> tuple[Vector, str, int]:
    """(the LoRA of a job, its name in ComfyUI's list, its step). For a job that is not done: the
    LoRA of its newest checkpoint, "", and that step.

    Raises NoJob for an unknown job, and ValueError if there is no LoRA yet, or if the job that is
    waited for fails or is paused.

    Args:
        wait: whether to wait first until the job is done. show: called with the job meanwhile.
    """
    job = store().job(identifier)
    if wait and job.state != "done":
        job = _done(job, show)
    if job.lora_name is not None:
        file = Path(folder_paths.get_full_path_or_raise("loras", job.lora_name))
        return read(file), job.lora_name, job.step
    newest = checkpoints.newest(store().checkpoints(identifier))
    if newest is None:
        raise ValueError(f"The job {job.name!r} has no checkpoint yet: {job.progress()}.")
    return _vector(job, newest, {}), "", newest.step


def export(identifier: str, step: int) -> str:
    """Writes the LoRA of one of a job's checkpoints to the loras folder, unless it is there; -> its
    name in ComfyUI's list.

    Raises NoJob, and ValueError if there is no such checkpoint, it is damaged, its style LoRA is
    gone, or another file has that name.
    """
    jobs = store()
    job = jobs.job(identifier)
    name = f"{job.name}-step-{step}"
    file = inside(_loras(), name)
    mark = {"lcm_lora.job": f"{identifier}, step {step}"}
    if file.exists():
        if mark.items() <= read(file, mapped=True).metadata.items():
            return f"{name}.safetensors"
        raise ValueError(f"{file.name} exists already, but not from this job: rename that file.")
    write(file, of_checkpoint(identifier, step, mark), "fp16", overwrite=False)
    return f"{name}.safetensors"


def checkpoint_steps(identifier: str) -> list[int]:
    """The steps of the checkpoints that a job has now. Raises NoJob."""
    jobs = store()
    jobs.job(identifier)
    return checkpoints.steps(jobs.checkpoints(identifier))


def of_checkpoint(identifier: str, step: int, metadata: dict[str, str]) -> Vector:
    """The LoRA of one of a job's checkpoints. metadata: to add to its own.

    Raises NoJob, and ValueError if there is no such checkpoint, it is damaged, or its style LoRA is
    gone.
    """
    job = store().job(identifier)
    try:
        checkpoint = checkpoints.read(store().checkpoints(identifier), step)
    except FileNotFoundError:
        kept = ", ".join(map(str, checkpoint_steps(identifier))) or "none"
        raise ValueError(f"The job has no checkpoint of step {step}. It has: {kept}.") from None
    except ValueError as error:
        raise ValueError(f"{error} Choose another one.") from None
    return _vector(job, checkpoint, metadata)


def _vector(job: Job, checkpoint: checkpoints.Checkpoint, metadata: dict[str, str]) -> Vector:
    """The LoRA of a checkpoint, with the styles that were baked into the teacher."""
    spec = read_spec(store().path(job.id) / "spec.json")
    source = f"{job.name}, step {checkpoint.step}"
    made = vector(checkpoint.adapter, spec.lora_alpha, family_metadata(spec) | metadata, source)
    return with_styles(made, [_style(lora) for lora in spec.loras])


def _done(job: Job, show: Callable[[Job], None]) -> Job:
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
            show(job)
            time.sleep(LOOK)
            job = store().job(job.id)
    finally:
        waiting.remove(job.id)
    return job


def _style(lora: StyleLoRA) -> tuple[Vector, float]:
    """The model part of a style LoRA, which the teacher contains, and its strength."""
    path = Path(lora.path)
    if not path.is_file():
        raise ValueError(
            f"The job's style LoRA {path.name} is gone: put it back into the loras folder."
        )
    style = read(path)
    return style.only({m for m in style.modules() if place_of(m) != "text"}), lora.strength


def _spec(order: Order, banks: Path) -> Spec:
    styles: tuple[StyleLoRA, ...] = ()
    if order.style_lora:
        styles = (StyleLoRA(_listed("loras", order.style_lora), order.style_strength),)
    order = order.with_length()
    if order.start_from:
        order = replace(order, start_from=_listed("loras", order.start_from))
    parts: dict[str, Any] = {}
    if order.teacher.diffusion_model:
        checkpoint = _listed("diffusion_models", order.teacher.diffusion_model)
        parts["text_encoders"] = tuple(
            _listed("text_encoders", name) for name in order.teacher.text_encoders
        )
        parts["vae"] = _listed("vae", order.teacher.vae)
    else:
        checkpoint = _listed("checkpoints", order.checkpoint)
    settings = shared(order, Spec) | shared(order.data, Spec) | {"guidance": (order.guidance,)}
    if order.data.auto_resolution:
        settings["resolution"] = _own_resolution(Path(checkpoint))
    return Spec(
        host=str(Path(folder_paths.__file__).resolve().parent),
        host_flags=_flags(),
        checkpoint=checkpoint,
        loras=styles,
        embeddings=tuple(map(os.path.abspath, folder_paths.get_folder_paths("embeddings"))),
        output=str(inside(_loras(), order.name)),
        banks=str(banks),
        data=_data(order.data),
        sample_prompts=_prompts(order.sample_prompts, "sample prompts", MOST_SAMPLES),
        **parts,
        **settings,
    )


def _own_resolution(checkpoint: Path) -> int:
    try:
        return CheckpointFile.read(checkpoint).resolution
    except ValueError as error:
        raise ValueError(f"{error} Switch auto_resolution off and set resolution.") from error


def _data(order: DataOrder) -> Data:
    kind = "pictures" if order.kind == "pictures" else "prompts"
    if order.kind != "prompts":
        return Data(kind=kind, path=_input(order.path), **shared(order, Data))
    prompts = _prompts(order.prompts, "prompts", MOST_PROMPTS, " Use a prompt file.")
    return Data(kind=kind, prompts=prompts, **shared(order, Data))


def _prompts(text: str, what: str, most: int, remedy: str = "") -> tuple[str, ...]:
    """The prompts of a text, one a line."""
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    longest = max(map(len, prompts), default=0)
    if len(prompts) > most or longest > LONGEST_PROMPT:
        raise ValueError(
            f"There are {len(prompts)} {what}, the longest of {longest} characters; at most "
            f"{most} of {LONGEST_PROMPT} are allowed here.{remedy}"
        )
    return prompts


def lora(name: str) -> dict[str, Any]:
    """What a LoRA file holds, for the page. Raises ValueError if ComfyUI does not list the file, or
    if it holds no LoRA."""
    if name not in offered(folder_paths.get_filename_list("loras")):
        raise ValueError(
            f"ComfyUI lists no LoRA {plain(name, 200)!r}. Expected a .safetensors file by the name "
            "that LoRA loaders show."
        )
    return public(read(Path(_listed("loras", name)), mapped=True), name)


def _input(name: str) -> str:
    """The path of a file or folder in ComfyUI's input folder, which may be a link."""
    base = Path(os.path.abspath(folder_paths.get_input_directory()))
    path = Path(os.path.normpath(base / name))
    if not name.strip() or not path.is_relative_to(base) or path == base:
        raise ValueError(f"{name!r} is not inside ComfyUI's input folder, where it must be.")
    if not path.exists():
        raise ValueError(f"There is no {name!r} in ComfyUI's input folder.")
    return str(path)


def _listed(kind: str, name: str) -> str:
    """The path of a file that ComfyUI lists."""
    if name not in folder_paths.get_filename_list(kind):
        raise ValueError(
            f"ComfyUI lists no {name!r} among its {kind}: choose one that it lists, or put the "
            "file there and press R."
        )
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise ValueError(f"ComfyUI lists {name!r}, but its file is gone: put it back, or press R.")
    # Links stay, because the target's name may lack the suffix that says how to read it.
    return os.path.abspath(path)


def _loras() -> Path:
    return Path(folder_paths.get_folder_paths("loras")[0]).resolve()


def _flags() -> tuple[str, ...]:
    """The flags of this server that its jobs get too."""
    given, kept = sys.argv[1:], []
    for i, flag in enumerate(given):
        if flag in FLAGS:
            kept.append(flag)
        elif flag in VALUED_FLAGS:  # --directml may have no value
            kept += [flag, *(word for word in given[i + 1 : i + 2] if not word.startswith("-"))]
        elif flag.startswith(tuple(f"{valued}=" for valued in VALUED_FLAGS)):
            kept.append(flag)
    return tuple(kept)
