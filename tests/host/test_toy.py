"""The assembled toy in the real host: it loads as SD1.5, and its files are whole."""

import torch
from safetensors.torch import load_file


def test_the_host_loads_it_as_sd15(comfy, toy_checkpoint):
    import comfy.model_base
    import comfy.sd
    import comfy.supported_models

    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(toy_checkpoint))
    assert isinstance(model.model.model_config, comfy.supported_models.SD15)
    assert model.model.model_type is comfy.model_base.ModelType.EPS
    text = clip.encode_from_tokens(clip.tokenize("a photo of a bag"))
    other = clip.encode_from_tokens(clip.tokenize("a photo of a dress"))
    assert text.shape == (1, 77, 768) and text.isfinite().all()
    assert (text - other).norm() > 0.1 * text.norm()
    pixels = vae.decode(torch.zeros(1, 4, 8, 8))
    assert pixels.shape == (1, 64, 64, 3) and pixels.isfinite().all()


def test_every_key_of_both_loras_is_taken(comfy, toy_checkpoint):
    import comfy.lora
    import comfy.lora_convert
    import comfy.sd
    from lcm_lora.dev.toy import assemble

    model = comfy.sd.load_checkpoint_guess_config(str(toy_checkpoint))[0]
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    for name in (assemble.LCM_LORA, assemble.STICKER_LORA, assemble.BLUEPRINT_LORA):
        tensors = load_file(assemble.lora(name))
        assert all(name.startswith("lora_unet_") for name in tensors)
        taken = comfy.lora.load_lora(tensors, keys)
        assert len(taken) == len(tensors) / 3


def test_a_small_step_in_the_schedule_is_a_small_step_in_the_picture(comfy, toy_checkpoint):
    """The UNet denoises: from a lightly noised latent it finds the clean one again."""
    import comfy.sd

    model = comfy.sd.load_checkpoint_guess_config(str(toy_checkpoint))[0]
    network = model.model.diffusion_model
    like = next(network.parameters())
    with torch.no_grad():
        noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(like)
        times, context = like.new_full((8,), 999.0), like.new_zeros(8, 77, 768)
        guess = network(noise, times, context=context)
    # At the noisiest timestep the latent is nearly all noise, and the network says so.
    assert (guess - noise).square().mean() < 0.2
