"""Shared by all parts: the clock, the report, and the device's time and memory."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from ...training.disk import replace
from ..bench import networks
from ..bench.report import Report
from ..bench.timing import Taken, timed

log = logging.getLogger("lcm_lora")
SIDES = {"SD1.5": 64, "SDXL": 128}  # of the latents


class Kit:
    """A part's run. Its report is written after every row.

    tiny: small networks and few runs. seconds: until the part is ended. work: scratch of all parts.
    out: what people get.
    """

    def __init__(
        self, part: str, host: Path, tiny: bool, seconds: float, work: Path, out: Path
    ) -> None:
        self.part, self.host, self.tiny, self.out = part, host, tiny, out
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.until = time.monotonic() + seconds
        self.result, self.work = work / f"{part}.json", work / part
        self.work.mkdir(parents=True, exist_ok=True)
        self.report, self.notes = Report(f"gpu-{part}"), list[str]()
        import comfy.utils

        comfy.utils.set_progress_bar_enabled(False)

    def left(self) -> float:
        return self.until - time.monotonic()

    def add(
        self, case: str, subject: str, metric: str, unit: str, values: float | list[float]
    ) -> None:
        values = [float(v) for v in (values if isinstance(values, list | tuple) else [values])]
        if values:
            self.report.add(case, subject, metric, unit, values)
            self.write()

    def bar(self, name: str, value: float, limit: float) -> None:
        self.report.bar(name, float(value), float(limit))
        self.write()

    def note(self, text: str) -> None:
        log.info("[%s] %s", self.part, text)
        self.notes.append(text)
        self.write()

    def write(self) -> None:
        replace(self.result, json.dumps(asdict(self.report) | {"notes": self.notes}, indent=1))

    @contextlib.contextmanager
    def case(self, title: str, needs: float = 0.0) -> Iterator[bool]:
        """A case whose failure does not end the others. False inside if not enough seconds are
        left for it."""
        if self.left() < needs:
            self.note(f"{title}: left out, {self.left():.0f} s are left and it wants {needs:.0f}")
            yield False
            return
        begun = time.monotonic()
        try:
            yield True
        except Exception as error:
            self.failed(title, error)
        else:
            log.info("[%s] %s: %.1f s", self.part, title, time.monotonic() - begun)
        self.forget()

    def failed(self, title: str, error: Exception) -> None:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        self.note(
            f"{title}: FAILED, {type(error).__name__}: {str(error)[:400]} "
            f"({Path(where.filename).name}:{where.lineno})"
        )

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def forget(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def seconds(self, call: Callable[[], object], runs: int, warm: int = 1) -> list[float]:
        """The values of each counted run."""
        for _ in range(warm):
            call()
        return [timed(call).seconds for _ in range(1 if self.tiny else runs)]

    def turns(self, subjects: dict[str, Callable[[], object]], runs: int, seconds: float) -> Turns:
        """Two warm-up rounds and `runs` counted ones. Three counted rounds run even if the time is
        over. A subject that fails is noted and left out."""
        turns, alive = Turns(), dict(subjects)
        until = time.monotonic() + min(seconds, self.left())
        for number in range(-1 if self.tiny else -2, runs):
            if number >= 3 and time.monotonic() > until:
                break
            for name in list(alive)[:: 1 if number % 2 else -1]:
                try:
                    taken = timed(alive[name])
                except Exception as error:
                    self.failed(name, error)
                    del alive[name]
                    continue
                if number >= 0:
                    turns.runs.setdefault(name, []).append(taken)
        return turns


class Turns:
    """One run per round of each subject that did not fail."""

    def __init__(self) -> None:
        self.runs: dict[str, list[Taken]] = {}

    def peak(self, name: str) -> int:
        """Bytes."""
        return max(run.peak for run in self.runs[name])

    def ratio(self, above: str, below: str) -> float | None:
        """The median ratio of the times."""
        a, b = self.runs.get(above), self.runs.get(below)
        if not a or not b:
            return None
        return statistics.median(x.seconds / y.seconds for x, y in zip(a, b, strict=False))

    def rows(self, kit: Kit, case: str) -> None:
        for name, runs in self.runs.items():
            kit.add(case, name, "wall", "ms", [1000 * run.seconds for run in runs])
            kit.add(case, name, "device span", "ms", [1000 * run.device_seconds for run in runs])
            kit.add(case, name, "peak memory", "GB", self.peak(name) / 1e9)


def case_name(kit: Kit, architecture: str, dtype: torch.dtype) -> str:
    return f"{architecture} {8 * side(kit, architecture)}px {str(dtype)[6:]}"


def side(kit: Kit, architecture: str) -> int:
    return 8 if kit.tiny else SIDES[architecture]


def configs(kit: Kit, architecture: str) -> tuple[dict, dict]:
    """ComfyUI's and diffusers' description of a network, or of a small one of the same kind."""
    if not kit.tiny:
        return networks.ARCHITECTURES[architecture], networks.DIFFUSERS[architecture]
    if architecture == "SD1.5":
        return networks.SMALL, networks.SMALL_DIFFUSERS
    return networks.SMALL_SDXL, networks.SMALL_SDXL_DIFFUSERS


def model_of(kit: Kit, architecture: str, dtype: torch.dtype):
    """A ModelPatcher of the host around a random network, made on the device (the host's loader
    would take it through the processor's memory)."""
    import comfy.model_base as base
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models as known

    config, _ = configs(kit, architecture)
    kind, model_kind = {
        "SD1.5": (known.SD15, base.BaseModel), "SDXL": (known.SDXL, base.SDXL)
    }[architecture]  # fmt: skip
    described = kind(config | {"adm_in_channels": config.get("adm_in_channels")})
    described.unet_config |= config  # it has put the heads of the real network there
    described.set_inference_dtype(dtype, None)
    model = model_kind(described, base.ModelType.EPS, device=kit.device)
    model.to(kit.device)
    networks.fill(model.diffusion_model)
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=torch.device("cpu")
    )


def diffusers_unet(kit: Kit, architecture: str, network: torch.nn.Module):
    """diffusers' network on the same tensors."""
    import comfy.utils
    import diffusers

    config, described = configs(kit, architecture)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**described)
    names, parameters = comfy.utils.unet_to_diffusers(config), dict(network.named_parameters())
    unet.load_state_dict({n: parameters[names[n]] for n in unet.state_dict()}, assign=True)
    return unet.eval().requires_grad_(False)
