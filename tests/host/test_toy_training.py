"""The toy's training, a few steps of every stage: each runs, learns and leaves a usable file."""

import pytest
import torch

COUNT, BATCH = 3, 4


@pytest.fixture(scope="module")
def parts(comfy):
    from lcm_lora.dev.toy import networks

    generator = torch.Generator().manual_seed(0)
    unet = networks.unet()
    networks.initialise(unet, 0)
    return {
        "pixels": torch.randint(256, (16, 28, 28), generator=generator, dtype=torch.uint8),
        "latents": torch.randn(16, 4, 8, 8, generator=generator),
        "labels": torch.arange(16) % 10,
        "context": torch.randn(31, 77, 768, generator=generator),
        "unet": unet,
    }


def test_the_networks_train(parts):
    from lcm_lora.dev.toy import train

    vae = train.vae(parts["pixels"], COUNT, BATCH)
    assert train.encode(vae, torch.rand(2, 3, 64, 64)).shape == (2, 4, 8, 8)
    classifier = train.classifier(parts["pixels"], parts["labels"], COUNT, BATCH)
    guesses = classifier(torch.rand(2, 3, 64, 64))
    assert [tuple(guess.shape) for guess in guesses] == [(2, 10), (2, 8), (2, 6)]
    data = parts["latents"], parts["labels"], parts["context"]
    unet = train.unet(*data, count=COUNT, batch=BATCH)
    assert all(p.isfinite().all() for p in unet.parameters())


@pytest.mark.parametrize("kind", ["lcm", "style"])
def test_a_lora_trains_and_its_file_is_taken_whole(parts, kind, tmp_path):
    from lcm_lora.dev.toy import train
    from lcm_lora.lora.formats import files

    data = parts["latents"], parts["labels"], parts["context"]
    before = {name: p.clone() for name, p in parts["unet"].named_parameters()}
    if kind == "lcm":
        adapter = train.lcm_lora(parts["unet"], *data, 2.0, rank=2, count=COUNT, batch=BATCH)
    else:
        adapter = train.style_lora(parts["unet"], *data, rank=2, count=COUNT, batch=BATCH)
    assert any(layer.up.abs().max() > 0 for layer in adapter.layers)
    tensors = train.exported(adapter, tmp_path / "toy.safetensors")
    assert len(tensors) == 3 * len(adapter.names)
    assert len(files.read(tmp_path / "toy.safetensors").deltas) == len(adapter.names)
    for name, weight in parts["unet"].named_parameters():
        assert torch.equal(weight, before[name]), f"{name} of the frozen network changed"
