"""A small flow model of a part of the demo's world: ComfyUI's SD3 class, three blocks (4.9 M).

Its VAE is the demo model's with each of the four channels four times, as SD3's latents have
sixteen. Its text encoder is the same random CLIP-L, alone, so the other features of its text are
zeros, and the network is trained without the weights that would read them. Git holds none of it.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from comfy.latent_formats import SD3
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from . import assemble, learn, networks, planes, sprites, text

DEPTH, TIMES = 3, 4
SHIFT = 3.0  # of SD3's sigmas
# The features of ComfyUI's SD3 text, of which those of CLIP-L come first.
FEATURES, POOLED = 4096, 2048
# Tokens of a caption. Its own are among the first of them, the rest says the same at every place:
# most of the training does without.
SHORT, SHORT_SHARE = 24, 0.75
SHARE = 0.75  # of the time that goes into training; drawing and encoding take about the rest
BATCH, RATE = 32, 1e-3
GUIDANCE = 3.0
WORLD = "few"
CAPTIONS, DRAWINGS = 1_000, 4
FOLDER, NAME = "toy-flow", "demo-flow.safetensors"


def network() -> nn.Module:
    """SD3's, for CLIP-L's features alone, as it starts: blocks and output are 0 (DiT, arXiv
    2212.09748)."""
    width = 64 * DEPTH
    model = OpenAISignatureMMDITWrapper(
        in_channels=4 * TIMES, depth=DEPTH, input_size=None, adm_in_channels=text.WIDTH,
        qk_norm="rms", dtype=torch.float32, operations=comfy.ops.disable_weight_init,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": text.WIDTH, "out_features": width},
        },
    )  # fmt: skip
    for name, weight in model.named_parameters():
        weight.requires_grad_(True)
        with torch.no_grad():
            weight.fill_(float(weight.dim() == 1 and name.endswith("weight")))  # a norm's
    networks.initialise(
        nn.ModuleDict(_linears(model)), 11, zero=("adaLN_modulation/1", "final_layer/linear")
    )
    return model


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.Linear | nn.Conv2d
    return {
        name.replace(".", "/"): part
        for name, part in model.named_modules() if isinstance(part, kinds)
    }  # fmt: skip


def encoder() -> comfy.sd.CLIP:
    """The demo's CLIP-L, as ComfyUI loads it for SD3."""
    prefix = "cond_stage_model.transformer."
    state = {name.removeprefix(prefix): value for name, value in text.state_dict().items()}
    return comfy.sd.load_text_encoder_state_dicts([state], clip_type=comfy.sd.CLIPType.SD3)


def velocity_loss(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator,
    length: int,
) -> torch.Tensor:  # fmt: skip
    """Of the velocity eps - x0, at logit-normal times (SD3, arXiv 2403.03206, section 3.1) that the
    model's shift makes noisier. length: tokens of the caption that the network sees."""
    x, features = batch
    x = x.repeat_interleave(TIMES, 1)
    u = torch.randn(len(x), generator=generator, device=x.device).sigmoid()
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    eps = torch.randn(x.shape, generator=generator, device=x.device)
    s = sigma.view(-1, 1, 1, 1)
    with learn.autocast(x.device):
        guess = model(
            (1 - s) * x + s * eps, 1000 * sigma, context=features[:, :length], y=features[:, -1]
        )
    return (guess.float() - (eps - x)).square().mean()


def fit(pictures: learn.Pictures, clock: learn.Clock) -> nn.Module:
    device = pictures.latents.device
    model = network().to(device)
    generator = torch.Generator(device).manual_seed(12)
    optimiser = learn.optimiser_of(model.parameters())
    average = 1.0
    for progress in clock.steps(optimiser, RATE):
        length = SHORT if progress < SHORT_SHARE else text.LENGTH
        loss = velocity_loss(model, pictures.batch(BATCH, generator), generator, length)
        learn.descend(loss, optimiser)
        average += 0.02 * (float(loss.detach()) - average)
        if clock.step % 100 == 0:
            learn.log.info("flow: loss %.4f", average)
    return model.eval()


def make(work: Path, cache: Path, minutes: float) -> None:
    """Trains what `work` does not hold yet, on the host's device: stages as in command.make."""
    work.mkdir(parents=True, exist_ok=True)
    device = comfy.model_management.get_torch_device()

    def drawn() -> dict[str, torch.Tensor]:
        painter = learn.Painter({WORLD: sprites.load("3d", cache).to(device)}, 61)
        specs = painter.specs(WORLD, CAPTIONS)
        repeated = [spec for spec in specs for _ in range(DRAWINGS)]
        vae = networks.vae().to(device, memory_format=torch.channels_last)
        vae.load_state_dict(_demo_vae())
        return {
            "latents": learn.latents(vae, painter, WORLD, repeated, batch=32),
            "caption": torch.arange(len(specs)).repeat_interleave(DRAWINGS),
            "contexts": learn.contexts(
                encoder(), [*(spec.caption for spec in specs), ""], device, 32, with_pooled=True
            ),
        }

    kept = learn.stage(work, "flow-pictures", drawn)
    pictures = learn.Pictures(**{name: value.to(device) for name, value in kept.items()})
    clock = learn.Clock("flow", 60 * minutes * SHARE)
    learn.stage(work, "flow", lambda: fit(pictures, clock).state_dict())


def _demo_vae() -> dict[str, torch.Tensor]:
    shapes = {name: value.shape for name, value in networks.vae().state_dict().items()}
    return planes.unpack(load_file(assemble.WEIGHTS / "vae.safetensors"), shapes)


def state_dict(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A trained network -> a checkpoint as the host's loader reads it, float16."""
    model = dict(model)
    for name, width in (("context_embedder", FEATURES), ("y_embedder.mlp.0", POOLED)):
        weight = model[f"{name}.weight"]
        model[f"{name}.weight"] = nn.functional.pad(weight, (0, width - weight.shape[1]))
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in model.items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in wide_vae().items()}
    before, after = "cond_stage_model.", "text_encoders.clip_l."
    state |= {name.replace(before, after): value for name, value in text.state_dict().items()}
    return {name: value.half().contiguous() for name, value in state.items()}


def wide_vae() -> dict[str, torch.Tensor]:
    """The demo's VAE, whose encoder makes each channel TIMES times, and whose decoder takes their
    mean."""
    state = _demo_vae()
    last = max(
        (name.rpartition(".")[0] for name in state if name.startswith("taesd_encoder")),
        key=lambda name: int(name.split(".")[1]),
    )
    for name in (f"{last}.weight", f"{last}.bias"):
        if name in state:
            state[name] = state[name].repeat_interleave(TIMES, 0)
    first = "taesd_decoder.1.weight"
    state[first] = state[first].repeat_interleave(TIMES, 1) / TIMES
    latents = SD3()
    state["vae_scale"] = torch.tensor(latents.scale_factor)
    state["vae_shift"] = torch.tensor(latents.shift_factor)
    return state


def checkpoint(work: Path) -> Path:
    """The model's file (280 MB) beside its training, made there if it is not."""
    trained = work / "flow.safetensors"
    if not trained.exists():
        raise SystemExit("There is no flow model yet: run `python3 dev toy --flow` first.")
    parts = [trained, assemble.WEIGHTS / "vae.safetensors"]
    return assemble.made(
        NAME, parts, work, lambda path: save_file(state_dict(load_file(trained)), path)
    )
