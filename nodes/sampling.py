"""The sampling nodes: the noise schedule of a MODEL, SIGMAS, a SAMPLER, and all in one node."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..samplers import host
from ..samplers.families import DEFAULT, FAMILIES
from .texts import as_ui, of_family, of_run, of_sampling

CATEGORY = "LCM-LoRA"
# Saved workflows fix this order: families of flow models came after auto.
FAMILY_CHOICES = [
    *(name for name, family in FAMILIES.items() if family.tables),
    "auto",
    *(name for name, family in FAMILIES.items() if not family.tables),
]


class LCMModelSampling(io.ComfyNode):
    """Sets the noise schedule of an LCM on any MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMModelSampling",
            display_name="LCM Model Sampling",
            category=CATEGORY,
            description=(
                "Makes a MODEL sample as a latent consistency model, at the timesteps of its "
                "distillation and with the consistency function. The model keeps its own "
                "prediction type (eps, v or x0) and noise levels. Load LCM-LoRA does this "
                "already; use this node after other LoRA loaders. In ComfyUI's KSampler, choose "
                "sampler lcm and scheduler simple. For TCD, DMD2, Hyper-SD, PCM and Lightning "
                "models, choose auto or their family. A flow model (Flux, Qwen-Image, Wan) keeps "
                "its own shift, unless its family has another."
            ),
            search_aliases=[
                "lcm", "ModelSamplingDiscrete", "consistency", "model sampling", "tcd", "dmd2",
                "hyper-sd", "pcm", "lightning",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Stable Diffusion 1, 2 or XL model with an LCM-LoRA "
                    "applied, or a flow model with a few-step LoRA."
                ),
                io.Combo.Input(
                    "family", options=FAMILY_CHOICES, default=DEFAULT, optional=True,
                    tooltip="How the LoRA or the full model was distilled. LCM Schedule, LCM "
                    "Sampler and LCM KSampler follow it. auto takes the family of the LoRA from "
                    "Apply LoRA Vector.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The model with the noise schedule of an LCM."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: ModelPatcher, family: str = DEFAULT) -> io.NodeOutput:
        chosen = host.auto_family(model) if family == "auto" else family
        patched = host.patch_sampling(model, chosen)
        lines = [*of_family(model, family, chosen), *of_sampling(patched)]
        return io.NodeOutput(patched, ui=as_ui(*lines))


class LCMSchedule(io.ComfyNode):
    """The exact timesteps of a few-step run, as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMSchedule",
            display_name="LCM Schedule",
            category=CATEGORY,
            description=(
                "Gives the noise levels of a few-step run for SamplerCustom and "
                "SamplerCustomAdvanced, at exactly the timesteps the LCM-LoRA was distilled on. "
                "With 4 steps, an LCM uses the timesteps 999, 759, 499, 259; a MODEL of another "
                "family uses the timesteps of that family. For a flow model (Flux, Qwen-Image, "
                "Wan), the sigmas are shifted as its family needs."
            ),
            search_aliases=["lcm", "sigmas", "scheduler", "timesteps", "few steps"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to sample; its noise levels and family are used."
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=50,
                    tooltip="Number of sampling steps. 4 is usual; 1 to 8 make sense.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.01, max=1.0, step=0.01,
                    tooltip="1 starts from pure noise. Lower values keep more of the input "
                    "picture: 0.5 starts at timestep 499. The number of steps stays the same.",
                ),
                io.Int.Input(
                    "origin_steps", default=50, min=1, max=1000, advanced=True,
                    tooltip="Number of points in the grid the LoRA was distilled on. LCM-LoRAs use "
                    "50; at 50 the MODEL's family sets the grid. Any other number gives an LCM "
                    "grid with that many points.",
                ),
                io.String.Input(
                    "timesteps", default="", optional=True, advanced=True,
                    tooltip='Your own descending list, such as "999, 749, 499, 249". It '
                    "replaces steps, strength and origin_steps. Leave it empty to use those. For a "
                    'flow model it is a list of sigmas, such as "1, 0.9, 0.75, 0.5".',
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="SIGMAS", tooltip="Noise levels from the first step down to 0."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        steps: int,
        strength: float,
        origin_steps: int,
        timesteps: str = "",
    ) -> io.NodeOutput:
        return io.NodeOutput(host.schedule(model, steps, strength, origin_steps, timesteps))


class LCMSampler(io.ComfyNode):
    """The LCM sampler, as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMSampler",
            display_name="LCM Sampler",
            category=CATEGORY,
            description=(
                "The few-step sampler of latent consistency models, for SamplerCustom and "
                "SamplerCustomAdvanced. Its noise between steps depends on the seed, the step and "
                "the picture's index in the batch, counted from 0. Those nodes draw the first "
                "noise. To get the same picture alone and in a batch, use LCM KSampler."
            ),
            search_aliases=["lcm", "tcd", "sampler", "eta", "gamma", "consistency"],
            inputs=[
                io.Float.Input(
                    "eta", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Share of fresh noise between steps (TCD's gamma). 1 is LCM, 0 is "
                    "deterministic; 0.3 suits TCD LoRAs.",
                ),
                io.Combo.Input(
                    "noise_device", options=["cpu", "gpu"], default="cpu", advanced=True,
                    tooltip="Where the noise between steps is drawn. cpu gives the same noise on "
                    "every machine; gpu draws it on the sampling device.",
                ),
                io.Boolean.Input(
                    "family_eta", default=False, optional=True,
                    tooltip="Use the eta of the MODEL's family instead of the number above.",
                ),
            ],
            outputs=[
                io.Sampler.Output(display_name="SAMPLER", tooltip="The sampler with its settings."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, eta: float, noise_device: str, family_eta: bool = False) -> io.NodeOutput:
        return io.NodeOutput(host.sampler(None if family_eta else eta, noise_device))


class LCMKSampler(io.ComfyNode):
    """Schedule, noise and sampler in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMKSampler",
            display_name="LCM KSampler",
            category=CATEGORY,
            essentials_category="Image Generation",
            description=(
                "Samples a picture in 1 to 8 steps, with the noise schedule, timesteps and sampler "
                "that an LCM-LoRA needs. It follows the family (LCM, TCD, DMD2, ...) of a MODEL "
                "from Load LCM-LoRA. A MODEL with an LCM-LoRA from another loader works too."
            ),
            search_aliases=[
                "lcm", "ksampler", "sampler", "few steps", "fast", "txt2img", "tcd", "dmd2",
                "hyper-sd", "pcm", "lightning",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A model with an LCM-LoRA applied."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip=(
                        "The same seed gives the same picture, also when it is taken out of its "
                        "batch."
                    ),
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=50,
                    tooltip="Number of sampling steps. 4 is usual; 1 to 8 make sense.",
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=30.0, step=0.1, round=0.01,
                    tooltip="Use 1 to 2, because guidance is distilled into the LCM-LoRA. At 1 the "
                    "negative prompt is not used and each step needs half the work; above 2 "
                    "colours burn.",
                ),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What the picture should not show. Only used when cfg is not 1.",
                ),
                io.Latent.Input(
                    "latent", tooltip="An empty latent, or a picture's latent for image to image."
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                    tooltip="1 makes a new picture. Lower values keep more of the input latent: "
                    "0.5 starts at timestep 499. The number of steps stays the same.",
                ),
                io.Float.Input(
                    "eta", default=-1.0, min=-1.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="Share of fresh noise between steps: 1 is LCM, 0 is deterministic. "
                    "Below 0, the MODEL's family sets it.",
                ),
                io.Combo.Input(
                    "noise_device", options=["cpu", "gpu"], default="cpu", optional=True,
                    advanced=True,
                    tooltip="Where the noise between steps is drawn. cpu gives the same noise on "
                    "every machine; gpu draws it on the sampling device.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The finished latent.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        seed: int,
        steps: int,
        cfg: float,
        positive: list[Any],
        negative: list[Any],
        latent: dict[str, Any],
        denoise: float,
        eta: float = -1.0,
        noise_device: str = "cpu",
    ) -> io.NodeOutput:
        run = host.Run(seed, steps, cfg, denoise, None if eta < 0 else eta, noise_device)
        made = host.sample(model, run, positive, negative, latent)
        return io.NodeOutput(made, ui=as_ui(*of_run(model, run, positive)))
