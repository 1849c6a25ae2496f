"""`python3 dev toy`: assembles the toy checkpoint; --train makes its weights anew first."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import assemble, data, judge, networks, pack, train

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


def main(arguments: list[str], cache: Path, local: Path) -> int:
    parser = argparse.ArgumentParser(prog="python3 dev toy", description=__doc__)
    parser.add_argument("--train", action="store_true", help="train all weights from scratch")
    chosen = parser.parse_args(arguments)
    if chosen.train:
        begun = time.monotonic()
        make(local / "toy-training", cache)
        log.info("the toy was trained in %.0f minutes", (time.monotonic() - begun) / 60)
    log.info("the toy checkpoint is %s", assemble.checkpoint(local / "models"))
    return 0
