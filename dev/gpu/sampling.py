"""Sampling at full size: LCM KSampler, the host's KSampler, diffusers and the bare network calls.

Then where the processor waits for the device, what the noise costs, and the VAE's share.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter

import torch

from ..bench import networks
from ..environment import ROOT
from .kit import Kit, case_name, diffusers_unet, model_of, side

log = logging.getLogger("lcm_lora")
OURS, OURS_GPU, HOST, DIFFUSERS, BARE = (
    "LCMKSampler", "LCMKSampler, noise on gpu", "host KSampler", "diffusers", "network calls",
)  # fmt: skip
TIMESTEPS = [999.0, 759.0, 499.0, 259.0]
GRID = (1, 1), (4, 1), (4, 4), (1, 4)  # steps, batch


class Case:
    """One architecture in one precision: the subjects on one set of weights."""

    def __init__(self, kit: Kit, architecture: str, dtype: torch.dtype) -> None:
        import comfy.model_management as management
        from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

        from ...samplers.host import patch_sampling

        self.kit, self.architecture, self.dtype = kit, architecture, dtype
        self.side = side(kit, architecture)
        model = model_of(kit, architecture, dtype)
        management.load_models_gpu([model])
        self.model, self.network = model, model.model.diffusion_model
        width = model.model.model_config.unet_config["context_dim"]
        generator = torch.Generator().manual_seed(0)
        self.text = torch.randn(1, 77, width, generator=generator)
        self.pooled = torch.randn(1, 1280, generator=generator)
        self.conditions = [[self.text, {"pooled_output": self.pooled}]]
        self.ours = patch_sampling(model)
        self.theirs = ModelSamplingDiscrete().patch(model, "lcm", False)[0]
        self.pipeline = self._pipeline()

    def _pipeline(self):
        import diffusers

        scheduler = diffusers.LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        unet = diffusers_unet(self.kit, self.architecture, self.network)
        parts = {"unet": unet, "scheduler": scheduler, "vae": None, "text_encoder": None}
        if self.architecture == "SDXL":
            made = diffusers.StableDiffusionXLPipeline(
                **parts, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
                add_watermarker=False,
            )  # fmt: skip
        else:
            made = diffusers.StableDiffusionPipeline(
                **parts, tokenizer=None, safety_checker=None, feature_extractor=None,
                requires_safety_checker=False,
            )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        return made

    def difference(self) -> float:
        """The largest of the two networks' answers, relative to the largest number."""
        device, dtype = self.kit.device, self.dtype
        x = torch.randn(
            1, 4, self.side, self.side, generator=torch.Generator().manual_seed(1)
        ).to(device, dtype)  # fmt: skip
        t, text = torch.tensor([499.0], device=device), self.text.to(device, dtype)
        bare, pipe = {"context": text}, {"encoder_hidden_states": text}
        if self.architecture == "SDXL":
            pooled = self.pooled.to(device, dtype)
            sizes = torch.tensor([[8.0 * self.side] * 6])
            flat = self.model.model.embedder(sizes.flatten()).reshape(1, -1).to(device, dtype)
            bare["y"] = torch.cat([pooled, flat], 1)
            pipe["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.to(device)}
        one, other = self.network(x, t, **bare), self.pipeline.unet(x, t, **pipe).sample
        return float((one - other).abs().max() / one.abs().max())

    def latent(self, batch: int) -> dict:
        return {"samples": torch.zeros(batch, 4, self.side, self.side)}

    def sampled(self, steps: int, latent: dict, noise: str = "cpu") -> torch.Tensor:
        from ...nodes.sampling import LCMKSampler

        return LCMKSampler.execute(
            self.ours, 7, steps, 1.0, self.conditions, self.conditions, latent, 1.0, -1.0, noise
        ).result[0]["samples"]

    def hosts(self, steps: int, batch: int) -> torch.Tensor:
        import nodes

        return nodes.common_ksampler(
            self.theirs, 7, steps, 1.0, "lcm", "simple", self.conditions, self.conditions,
            self.latent(batch),
        )[0]["samples"]  # fmt: skip

    def subjects(self, steps: int, batch: int) -> dict:
        device, dtype = self.kit.device, self.dtype
        text = self.text.to(device, dtype).repeat(batch, 1, 1)
        x = torch.randn(batch, 4, self.side, self.side, device=device, dtype=dtype)
        times = torch.tensor(TIMESTEPS[:steps], device=device)
        bare, pipe = {"context": text}, {"prompt_embeds": text}
        if self.architecture == "SDXL":
            pooled = self.pooled.to(device, dtype).repeat(batch, 1)
            bare["y"] = torch.cat([pooled, torch.randn(batch, 1536, device=device, dtype=dtype)], 1)
            pipe["pooled_prompt_embeds"] = pooled
        return {
            OURS: lambda: self.sampled(steps, self.latent(batch)),
            OURS_GPU: lambda: self.sampled(steps, self.latent(batch), "gpu"),
            HOST: lambda: self.hosts(steps, batch),
            DIFFUSERS: lambda: self.pipeline(
                **pipe, num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
                height=8 * self.side, width=8 * self.side,
            ),
            BARE: lambda: [self.network(x, t.expand(batch), **bare) for t in times],
        }  # fmt: skip


def run(kit: Kit) -> None:
    import diffusers  # noqa: F401 (before any clock)

    half = torch.float16 if kit.cuda else torch.float32
    cases = [("SDXL", half), ("SD1.5", half)]
    if kit.cuda:
        cases.append(("SD1.5", torch.bfloat16))
    for number, (architecture, dtype) in enumerate(cases):
        one_case(kit, architecture, dtype, kit.left() / (len(cases) - number), number < 2)
        kit.forget()


def one_case(
    kit: Kit, architecture: str, dtype: torch.dtype, seconds: float, everything: bool
) -> None:
    import comfy.model_management as management

    name, end = case_name(kit, architecture, dtype), kit.left() - seconds
    case = None
    with kit.case(f"{name}: made", 10 if kit.cuda else 0) as go:
        case = Case(kit, architecture, dtype) if go else None
    if case is None:
        return
    grid = GRID[:2] if kit.tiny else GRID
    for at, (steps, batch) in enumerate(grid):
        share = max(1.5, (kit.left() - end) * (0.6 if everything else 0.9) / (len(grid) - at))
        with kit.case(f"{name}, {steps} steps, batch {batch}", 2) as go, torch.inference_mode():
            if go:
                compare(kit, case, name, steps, batch, share)
    for what, part, needed in (
        ("waits", waits, 3), ("noise", noise, 1), ("decoding", decoding, 5),
    ) if everything else ():  # fmt: skip
        with kit.case(f"{name}: {what}", needed) as go, torch.inference_mode():
            if go:
                part(kit, case, name)
    management.unload_all_models()


def compare(kit: Kit, case: Case, name: str, steps: int, batch: int, seconds: float) -> None:
    title = f"{name}, {steps} steps, batch {batch}"
    if (steps, batch) == (1, 1):
        finite = case.sampled(1, case.latent(1)).isfinite().all()
        kit.bar(f"{name}: numbers that are not finite", 0 if finite else 1, 0)
        limit = 1e-3 if case.dtype == torch.float32 else 5e-2
        kit.bar(f"{name}: largest difference of diffusers' network", case.difference(), limit)
        # The noise between the steps differs, so only the spread can be compared.
        ours, theirs = case.sampled(4, case.latent(1)), case.hosts(4, 1)
        kit.add(title, OURS, "deviation of the latent", "", float(ours.std()))
        kit.add(title, HOST, "deviation of the latent", "", float(theirs.std()))
    turns = kit.turns(case.subjects(steps, batch), 1 if kit.tiny else 20, seconds)
    turns.rows(kit, title)
    for one, other, limit in (
        (OURS, HOST, 1.01), (OURS, DIFFUSERS, 0.95), (OURS, BARE, 1.05), (OURS, OURS_GPU, 1.02)
    ):  # fmt: skip
        if (ratio := turns.ratio(one, other)) is not None:
            kit.bar(f"{title}: time, {one} / {other}", ratio, limit)
    if OURS in turns.runs and HOST in turns.runs:
        peaks = [turns.peak(name) for name in (OURS, HOST)]
        kit.bar(f"{title}: peak memory, ours / host", peaks[0] / peaks[1], 1.005)


def waits(kit: Kit, case: Case, name: str) -> None:
    """How often a run of 4 steps waits for the device, and where, by PyTorch's own warning; and the
    calls of the CUDA runtime, by the profiler."""
    subjects = case.subjects(4, 1)
    for each in (OURS, HOST, DIFFUSERS, BARE):
        subjects[each]()
        kit.sync()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if kit.cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                subjects[each]()
            finally:
                if kit.cuda:
                    torch.cuda.set_sync_debug_mode("default")
        places: Counter = Counter()
        for one in caught:
            if "synchroniz" in str(one.message):
                file = one.filename.removeprefix(f"{ROOT}/").removeprefix(f"{kit.host}/")
                places["/".join(file.split("/")[-4:]) + f":{one.lineno}"] += 1
        kit.add(f"{name}, 4 steps", each, "synchronising calls", "a run", sum(places.values()))
        if places:
            kit.note(f"{name}, {each}: waits at {dict(places.most_common(12))}")
        if kit.cuda:
            profiled(kit, f"{name}, 4 steps", each, subjects[each])


def profiled(kit: Kit, case: str, subject: str, call) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    counts: Counter = Counter()
    busy = 0.0
    for event in seen.key_averages():
        counts[event.key] += event.count
        if str(event.device_type).endswith("CUDA"):  # the kernels, not the calls that led there
            busy += event.self_device_time_total
    kit.add(case, subject, "device busy", "ms", busy / 1000)
    for key in (
        "cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaDeviceSynchronize",
        "cudaMalloc",
    ):  # fmt: skip
        if counts[key]:
            kit.add(case, subject, key, "a run", counts[key])


def noise(kit: Kit, case: Case, name: str) -> None:
    """One step's noise of one and four pictures, until it is on the device."""
    from ...samplers.noise import picture_noise

    for batch in (1, 4):
        like = case.latent(batch)["samples"].to(kit.device, case.dtype)
        for where in ("cpu", "gpu"):
            draw = picture_noise(like, 5, device=where)
            seconds = kit.seconds(lambda draw=draw: draw(1), 30, 3)
            kit.add(f"{name}, noise of batch {batch}", f"drawn on {where}", "time", "ms",
                    [1000 * s for s in seconds])  # fmt: skip


def decoding(kit: Kit, case: Case, name: str) -> None:
    """The time of a VAE and a TAESD, as the host runs them, beside that of sampling."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.taesd.taesd import TAESD

    config = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "ch": 128,
        "ch_mult": [1, 2, 4, 4],
    }  # fmt: skip
    with torch.device(kit.device):
        made = {"VAE": AutoencoderKL(ddconfig=config, embed_dim=4), "TAESD": TAESD()}
    vaes = {}
    for kind, network in made.items():
        networks.fill(network)
        with kit.case(kind):
            state = {key: value.cpu() for key, value in network.state_dict().items()}
            vaes[kind] = comfy.sd.VAE(sd=state)
    for batch in (1,) if kit.tiny else (1, 4):
        latent = torch.randn(batch, 4, case.side, case.side)
        sampling = kit.seconds(lambda b=batch: case.sampled(4, case.latent(b)), 3)
        for kind, vae in vaes.items():
            with kit.case(f"{kind}, batch {batch}", 1) as go:
                if not go:
                    continue
                seconds = kit.seconds(lambda v=vae, z=latent: v.decode(z), 5, 2)
                title = f"{name}, 4 steps and decoding, batch {batch}"
                kit.add(title, kind, "time", "ms", [1000 * s for s in seconds])
                middle = sorted(seconds)[len(seconds) // 2]
                whole = middle + sorted(sampling)[len(sampling) // 2]
                kit.add(title, kind, "share of the whole", "", middle / whole)
