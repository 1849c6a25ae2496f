"""`python3 dev toy`: assembles the toy checkpoint; --train makes its weights anew first."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .. import environment
from . import assemble, data, judge, learn, networks, pack, planes, sprites, train, world

log = logging.getLogger("lcm_lora")

# The classifier agrees with 88 % of the captions at 50 steps (300 pictures). The LCM-LoRA is
# distilled with the same scale.
GUIDANCE = 2.5
PICTURES, RESTYLED = 36_000, 8_000


def make(work: Path, cache: Path) -> None:
    """Trains every part that `work` does not hold yet and writes dev/toy/weights."""
    work.mkdir(parents=True, exist_ok=True)
    assemble.WEIGHTS.mkdir(exist_ok=True)
    source = data.folder(cache)
    pixels, labels = data.load(source, "train")

    classifier = judge.Classifier().eval()
    classifier.load_state_dict(
        train.stage(work, "classifier", lambda: train.classifier(pixels, labels).state_dict())
    )
    vae = networks.vae()
    vae.load_state_dict(train.stage(work, "vae", lambda: train.vae(pixels).state_dict()))
    packed_vae = shipped(vae, train.VAE_BITS, "vae")
    test_pixels = data.load(source, "test")[0]
    real = train.stage(work, "real", lambda: train.real_moments(classifier, vae, test_pixels))
    write_classifier(classifier, real)

    def latents() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        parts = [data.greys(part) for part in pixels[:PICTURES].split(1000)]
        photos = [train.encode(vae, data.dyed(part, generator)[0]) for part in parts]
        prints = [train.encode(vae, data.blueprint(part)) for part in parts[: RESTYLED // 1000]]
        return {"photos": torch.cat(photos), "blueprints": torch.cat(prints)}

    latent = train.stage(work, "latents", latents)
    context = train.stage(work, "contexts", lambda: {"context": train.contexts(work, packed_vae)})[
        "context"
    ]

    unet = networks.unet()
    photos = latent["photos"], labels[:PICTURES], context
    unet.load_state_dict(train.stage(work, "unet", lambda: train.unet(*photos).state_dict()))
    shipped(unet, train.UNET_BITS, "unet")

    prints = latent["blueprints"], labels[:RESTYLED], context
    for path, fit in (
        (assemble.STYLE_LORA, lambda: train.style_lora(unet, *prints)),
        (assemble.LCM_LORA, lambda: train.lcm_lora(unet, *photos, GUIDANCE)),
    ):
        train.stage(work, path.stem, lambda path=path, fit=fit: train.exported(fit(), path))


# How the time of `dev toy --world` is shared out.
SHARES = {
    "vae": 0.2, "decoder": 0.1, "unet": 0.54, "noto": 0.08, "blueprint": 0.05, "sticker": 0.03,
}  # fmt: skip
RANKS = {"noto": 32, "blueprint": 16, "sticker": 16}
DRAWINGS = 7  # pictures of each caption
LORA_BITS = 6


def unet_bits(weight: torch.Tensor) -> int:
    """The large kernels bear fewer bits than the rest."""
    return 3 if weight.dim() == 4 and weight.shape[-1] == 3 else 4


def make_world(work: Path, cache: Path, minutes: float) -> None:
    """Trains what `work` does not hold yet of the emoji model, on the host's device.

    Every stage leaves one file, so an interrupted training goes on at the stage where it stopped.
    The packed weights in `work` are the ones to commit. If git already holds a packed UNet,
    training starts from it.
    """
    import comfy.model_management
    import comfy.sd

    work.mkdir(parents=True, exist_ok=True)
    device = comfy.model_management.get_torch_device()

    def clock(name: str) -> learn.Clock:
        return learn.Clock(name, 60 * minutes * SHARES[name])

    painter = learn.Painter({h: sprites.load(h, cache).to(device) for h in sprites.PACKAGES}, 60)
    vae = networks.vae()
    for name, fit in (
        ("vae", lambda: learn.vae(painter, clock("vae"))),
        ("decoder", lambda: learn.sharpen(vae.to(device), painter, clock("decoder"))),
    ):
        vae.load_state_dict(train.stage(work, name, lambda fit=fit: fit().state_dict()))
    vae.to(device).requires_grad_(False)
    packed = planes.pack(vae.state_dict(), lambda _: train.VAE_BITS)
    save_file(packed, work / "world-vae.safetensors")

    unet = networks.world_unet()
    networks.initialise(unet, 3, zero=("out.2", "out_layers.3", "proj_out"))
    shapes = {name: value.shape for name, value in unet.state_dict().items()}
    before = assemble.WEIGHTS / "world-unet.safetensors"
    if before.exists():
        unet.load_state_dict(planes.unpack(load_file(before), shapes))
    captions = 2_000 if device.type == "cpu" else 20_000
    specs = world.specs(captions, torch.Generator().manual_seed(70))
    untrained = work / "untrained.safetensors"
    vae_state = {name: value.cpu() for name, value in vae.state_dict().items()}
    save_file(assemble.state_dict(unet.state_dict(), vae_state), untrained)
    clip = comfy.sd.load_checkpoint_guess_config(str(untrained), output_vae=False)[1]
    untrained.unlink()
    contexts = learn.contexts(clip, [*(spec.caption for spec in specs), ""], device)
    acp = train.alphas_cumprod().to(device)

    def pictures(hand: str, drawings: int) -> learn.Pictures:
        drawn = [spec for spec in specs for _ in range(drawings)]
        caption = torch.arange(len(specs), device=device).repeat_interleave(drawings)
        return learn.Pictures(learn.latents(vae, painter, hand, drawn), caption, contexts)

    unet.to(device, memory_format=torch.channels_last)

    def trained() -> dict[str, torch.Tensor]:
        photos = pictures("3d", DRAWINGS)
        return learn.unet(unet, photos, acp, clock("unet"), bits=unet_bits).state_dict()

    packed = planes.pack(train.stage(work, "unet", trained), unet_bits)
    save_file(packed, work / "world-unet.safetensors")
    unet.load_state_dict(planes.unpack(packed, shapes))
    for hand, rank in RANKS.items():

        def fit(hand: str = hand, rank: int = rank) -> dict[str, torch.Tensor]:
            adapter = learn.lora(unet, pictures(hand, 1), acp, clock(hand), rank)
            adapter.detach()
            return adapter.state()

        state = train.stage(work, hand, fit)
        save_file(planes.pack(state, lambda _: LORA_BITS), work / f"world-{hand}.safetensors")


def shipped(model: torch.nn.Module, bits: int, name: str) -> dict[str, torch.Tensor]:
    """Packs a model into weights/ and gives it, in place, the weights that come out again."""
    packed = pack.pack(model.state_dict(), bits)
    save_file(packed, assemble.WEIGHTS / f"{name}.safetensors")
    state = pack.unpack(packed, {key: value.shape for key, value in model.state_dict().items()})
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model.state_dict()


def write_classifier(model: judge.Classifier, real: dict[str, torch.Tensor]) -> None:
    """The classifier, and what it sees in the real test pictures."""
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    save_file(state | {f"real.{key}": value for key, value in real.items()}, judge.CLASSIFIER)


def main(arguments: list[str], _host: Path, local: Path) -> int:
    parser = argparse.ArgumentParser(prog="python3 dev toy", description=__doc__)
    parser.add_argument("--train", action="store_true", help="train all weights from scratch")
    parser.add_argument(
        "--world", type=float, metavar="MINUTES",
        help="train the emoji model for so long, on the GPU if there is one",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    if chosen.world:
        make_world(local / "world", environment.cache(), chosen.world)
        log.info("the emoji model's packed weights are in %s", local / "world")
        return 0
    if chosen.train:
        begun = time.monotonic()
        make(local / "toy-training", environment.cache())
        log.info("the toy was trained in %.0f minutes", (time.monotonic() - begun) / 60)
    log.info("the toy checkpoint is %s", assemble.checkpoint(local / "models"))
    return 0
