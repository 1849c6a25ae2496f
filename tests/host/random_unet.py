"""A small UNet of ComfyUI's own classes with random weights, and what samples with it."""

from __future__ import annotations

import torch

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1],
    "transformer_depth_output": [1, 1], "transformer_depth_middle": -2, "context_dim": 64,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,
    "num_heads": 4, "num_head_channels": -1, "use_temporal_attention": False,
    "adm_in_channels": None, "dtype": torch.float32,
}  # fmt: skip


def build(
    prediction: str = "eps", zsnr: bool = False, seed: int = 0, device: str = "cpu", **unet
):  # fmt: skip
    """A ModelPatcher around a random UNet that answers everywhere with numbers of about 1.

    device: where the host computes with it.
    """
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(UNET | unet)
    config.manual_cast_dtype = None
    config.sampling_settings = {"zsnr": zsnr}
    kind = comfy.model_base.ModelType.V_PREDICTION if prediction == "v" else None
    model = comfy.model_base.BaseModel(config, kind or comfy.model_base.ModelType.EPS)
    if config.inpaint_model():
        model.set_inpaint()
    randomise(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    there = torch.device(device)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=there, offload_device=cpu)
    if prediction == "x0":
        patcher = core_patch(patcher, "x0")
    return patcher


def randomise(network: torch.nn.Module, seed: int) -> None:
    """Weights with which every layer gives numbers of about 1, where the host leaves them empty."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            bound = weight[0].numel() ** -0.5
            weight.data = torch.randn(weight.shape, generator=generator) * bound
        else:
            norm = name.endswith("weight")
            weight.data = torch.ones_like(weight) if norm else torch.zeros_like(weight)


def core_patch(model, sampling: str, zsnr: bool = False):
    """The model through the host's own ModelSamplingDiscrete node."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(model, sampling, zsnr)[0]


def patched(model, family: str = "lcm"):
    from lcm_lora.nodes.sampling import LCMModelSampling

    return LCMModelSampling.execute(model, family).result[0]


def conditioning(seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 77, 64, generator=generator), {}]]


def empty(batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 4, 8, 8)}


def picture(batch: int = 1) -> dict:
    return {"samples": torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 5}


def ours(
    model, steps=4, seed=11, cfg=1.0, latent=None, denoise=1.0, positive=None, **advanced
) -> dict:
    """LCMKSampler, as the graph calls it."""
    from lcm_lora.nodes.sampling import LCMKSampler

    output = LCMKSampler.execute(
        model, seed, steps, cfg, positive or conditioning(1), conditioning(2), latent or empty(),
        denoise, **advanced,
    )  # fmt: skip
    return output.result[0]


def host_ksampler(model, scheduler: str, steps: int = 4, sampler: str = "lcm") -> torch.Tensor:
    import nodes

    run = nodes.KSampler().sample
    return run(
        model, 11, steps, 1.0, sampler, scheduler, conditioning(1), conditioning(2), empty()
    )[0]["samples"]  # fmt: skip


def one_by_one(model, latent: dict, steps: int = 4, **settings) -> torch.Tensor:
    """LCMSchedule and LCMSampler in the host's SamplerCustom."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from lcm_lora.nodes.sampling import LCMSampler, LCMSchedule

    sigmas = LCMSchedule.execute(model, steps, 1.0, 50).result[0]
    sampler = LCMSampler.execute(**{"eta": 1.0, "noise_device": "cpu"} | settings).result[0]
    output = SamplerCustom.execute(
        model, True, 11, 1.0, conditioning(1), conditioning(2), sampler, sigmas, latent
    )
    return output.result[0]["samples"]


class Calls:
    """What a MODEL's network was asked: sigma, timestep and batch of every call."""

    def __init__(self, model):
        self.model = model.clone()
        self.sigmas: list[float] = []
        self.timesteps: list[float] = []
        self.batches: list[int] = []
        self.model.set_model_unet_function_wrapper(self._call)

    def _call(self, apply_model, args):
        def see(_module, inputs):
            self.timesteps.append(inputs[1][0].item())

        self.sigmas.append(args["timestep"][0].item())
        self.batches.append(len(args["input"]))
        hook = self.model.model.diffusion_model.register_forward_pre_hook(see)
        try:
            return apply_model(args["input"], args["timestep"], **args["c"])
        finally:
            hook.remove()
