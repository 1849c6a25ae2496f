"""The small flow model of the demo's world: what is trained is what ComfyUI loads and samples."""

import pytest
import torch
from safetensors.torch import save_file

CAPTIONS = ("a photo of a fox", "a lemon on red stripes")


@pytest.fixture(scope="module")
def loaded(comfy, tmp_path_factory):
    """(a network with random weights, the model that ComfyUI loads of its file)"""
    from lcm_lora.dev.bench.subjects import Toy
    from lcm_lora.dev.toy import flow

    work = tmp_path_factory.mktemp("toy-flow")
    network = flow.network()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():  # the last layer starts at 0
            weight.copy_(weight + 0.02 * torch.randn(weight.shape, generator=generator))
    save_file({k: v.contiguous() for k, v in network.state_dict().items()},
              work / "flow.safetensors")  # fmt: skip
    return network, Toy.load(flow.checkpoint(work), solver=("euler", "simple"))


def test_comfyui_computes_what_was_trained(loaded):
    import comfy.model_management
    from lcm_lora.dev.toy import flow, learn

    network, toy = loaded
    assert type(toy.base.model).__name__ == "SD3" and toy.latent == (16, 16, 16)
    assert toy.base.model.model_sampling.shift == flow.SHIFT
    features = learn.contexts(
        flow.encoder(), list(CAPTIONS), torch.device("cpu"), with_pooled=True
    ).float()
    text, more = toy.encode(*CAPTIONS)[0]
    assert not text[..., 768:].any() and not more["pooled_output"][:, 768:].any()
    torch.testing.assert_close(text[..., :768], features[:, :-1], rtol=0.05, atol=0.05)  # bfloat16
    z = torch.randn(2, *toy.latent, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.7, 0.3])
    comfy.model_management.load_models_gpu([toy.base])
    with torch.no_grad():
        v = network(z, 1000 * sigma, context=text[..., :768], y=more["pooled_output"][:, :768])
        x0 = toy.base.model.apply_model(z, sigma, c_crossattn=text, y=more["pooled_output"])
    assert v.std() > 0.1
    torch.testing.assert_close(x0, z - sigma.view(-1, 1, 1, 1) * v, rtol=0.01, atol=0.005)


def test_its_latents_are_the_demos_four_times(loaded, toy_checkpoint):
    from lcm_lora.dev.bench.subjects import Toy

    toy, demo = loaded[1], Toy.load(toy_checkpoint)
    pixels = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    wide, narrow = (
        each.base.model.process_latent_in(each.vae.encode(pixels)) for each in (toy, demo)
    )
    torch.testing.assert_close(wide, narrow.repeat_interleave(4, 1), rtol=0.01, atol=0.01)
    drawn, same = (
        each.decode(each.base.model.process_latent_out(z))
        for each, z in ((toy, wide), (demo, narrow))
    )
    torch.testing.assert_close(drawn, same, rtol=0.01, atol=0.01)


def test_it_learns(comfy):
    """Both parts of the training: short captions, then whole ones."""
    from lcm_lora.dev.toy import flow, learn

    generator = torch.Generator().manual_seed(0)
    pictures = learn.Pictures(
        torch.randn(4, 4, 1, 1, generator=generator).expand(4, 4, 8, 8).contiguous(),
        torch.arange(4), torch.randn(5, 78, 768, generator=generator),
    )  # fmt: skip
    lengths, losses, loss_of = [], [], flow.velocity_loss

    def seen(model, batch, generator, length):
        loss = loss_of(model, batch, generator, length)
        lengths.append(length)
        losses.append(loss.item())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "velocity_loss", seen)
        flow.fit(pictures, learn.Clock("flow", 1e9, limit=60))
    assert lengths == [24] * 45 + [77] * 15
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
