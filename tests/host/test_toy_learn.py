"""The emoji model's training on small pictures: every stage runs and learns in a few steps."""

import pytest
import torch

STEPS = 1


@pytest.fixture
def small(comfy, monkeypatch):
    from lcm_lora.dev.toy import learn, world

    monkeypatch.setattr(world, "SIZE", 32)
    monkeypatch.setattr(learn, "MIXTURE", {"3d": 2, "blueprint": 1})
    generator = torch.Generator().manual_seed(0)
    shape = len(world.NAMES), 4, 32, 32
    drawn = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return learn.Painter({"3d": drawn, "blueprint": drawn}, 1)


def clock():
    from lcm_lora.dev.toy import learn

    return learn.Clock("test", 1000, STEPS)


def test_the_vae_and_its_decoder_train(small):
    from lcm_lora.dev.toy import learn

    vae = learn.vae(small, clock())
    encoder = {name: p.clone() for name, p in vae.taesd_encoder.named_parameters()}
    decoder = [p.clone() for p in vae.taesd_decoder.parameters()]
    learn.sharpen(vae, small, clock())
    for name, p in vae.taesd_encoder.named_parameters():
        assert torch.equal(p, encoder[name]), "what latents mean stays as it is"
    moved = zip(vae.taesd_decoder.parameters(), decoder, strict=True)
    assert any(not torch.equal(p, old) for p, old in moved)
    pictures = small.mixed({"3d": 2})
    latents = learn.encode(vae, pictures)
    assert latents.shape == (2, 4, 4, 4)
    assert learn.decode(vae, latents).shape == pictures.shape


def test_the_unet_ends_as_weights_that_packing_keeps_and_a_lora_trains_on_it(small):
    from lcm_lora.dev.toy import learn, networks, planes
    from lcm_lora.dev.toy.command import unet_bits

    generator = torch.Generator().manual_seed(0)
    pictures = learn.Pictures(
        torch.randn(4, 4, 4, 4, generator=generator), torch.arange(4),
        torch.randn(5, 77, 768, generator=generator),
    )  # fmt: skip
    unet = networks.unet()
    networks.initialise(unet, 3, zero=("out.2", "out_layers.3", "proj_out"))
    before = {name: p.clone() for name, p in unet.named_parameters()}
    acp = learn.alphas_cumprod()
    learn.unet(unet, pictures, acp, clock(), batch=2, bits=unet_bits, begin=0.0)
    assert any(not torch.equal(p, before[name]) for name, p in unet.named_parameters())
    shapes = {name: value.shape for name, value in unet.state_dict().items()}
    packed = planes.pack(unet.state_dict(), unet_bits)
    assert sum(value.nbytes for value in packed.values()) < 14e6
    unet.load_state_dict(planes.unpack(packed, shapes))
    adapter = learn.lora(unet, pictures, acp, clock(), rank=2, batch=2)
    assert all(layer.up.abs().max() > 0 for layer in adapter.layers)


def test_the_classifier_trains_and_the_judge_reads_its_file(small, monkeypatch, tmp_path):
    from lcm_lora.dev.toy import judge, learn, networks, world

    vae = networks.vae().eval()
    networks.initialise(vae, 2)
    seen = learn.labelled(small, vae, {"3d": 6, "blueprint": 2}, batch=4)
    assert seen["pictures"].shape == (8, 3, 32, 32) and seen["hand"].tolist() == [0] * 6 + [3] * 2
    assert (seen["colour"][:6] >= 0).all() and (seen["colour"][6:] == -100).all()
    model = learn.classifier(seen, clock(), batch=4)
    monkeypatch.setattr(judge, "CLASSIFIER", tmp_path / "classifier.safetensors")
    judge.write(model.state_dict(), seen, ("3d", "blueprint"))
    kept = judge.Judge()
    assert kept.real.shape == (3, judge.FEATURES)
    named = model.object(model.features(torch.rand(2, 3, 32, 32)))
    assert named.shape == (2, len(world.NAMES))


def test_a_stage_ends_by_time_and_a_pause_does_not_count(comfy, monkeypatch):
    from lcm_lora.dev.toy import learn

    now = [0.0]
    monkeypatch.setattr(learn.time, "monotonic", lambda: now[0])
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    watch = learn.Clock("test", 100)
    for progress in watch.steps(optimiser, 1.0):
        assert progress == pytest.approx(watch.step / 10)
        now[0] += 10
        if watch.step == 3:
            watch.between = lambda: now.__setitem__(0, now[0] + 1000 * (watch.step == 5))
    assert watch.worked == pytest.approx(100) and watch.step == 10
