"""Teachers of every family out of whole checkpoint files, as the host detects and loads them.

The UNets are as narrow as the host's detection allows, the text encoders of full size (the host
leaves missing layers uninitialised) and zero. Files of one to two GB: the SD2 and SDXL kinds run
with `python3 dev faults`.
"""

import pytest
import torch
from lcm_lora.dev.bench.networks import SD
from safetensors.torch import load_file, save_file

NARROW = {"num_res_blocks": [1], "channel_mult": [1], "transformer_depth_middle": -2}
ONE = SD | NARROW | {
    "context_dim": 768, "transformer_depth": [1], "transformer_depth_output": [1, 1],
    "num_heads": 8,
}  # fmt: skip
SD2 = SD | {
    "num_res_blocks": [2] * 4, "channel_mult": [1] * 4, "context_dim": 1024,
    "transformer_depth": [1] + [0] * 7, "transformer_depth_output": [1] + [0] * 11,
    "transformer_depth_middle": -2, "use_linear_in_transformer": True, "num_head_channels": 64,
}  # fmt: skip
TYPE_XL = SD | {
    "channel_mult": [1] * 3, "context_dim": 2048, "transformer_depth_middle": -2,
    "use_linear_in_transformer": True, "num_head_channels": 64, "num_classes": "sequential",
    "adm_in_channels": 2816,
}  # fmt: skip


def type_xl(depth):
    per_level = len(depth) // 3
    return TYPE_XL | {
        "num_res_blocks": [per_level] * 3, "transformer_depth": depth,
        "transformer_depth_output": [0] * (3 * (per_level + 1)),
    }  # fmt: skip


FAMILIES = {
    "SD2": (SD2, (), "eps"),
    "SD2 v": (SD2, ("v",), "v"),
    "SDXL": (type_xl([0, 0, 2, 2, 10, 10]), (), "eps"),
    "SDXL v zero-SNR": (type_xl([0, 0, 2, 2, 10, 10]), ("v_pred", "ztsnr"), "v"),
    "SSD-1B": (type_xl([0, 0, 2, 2, 4, 4]), (), "eps"),
    "Segmind Vega": (type_xl([0, 0, 1, 1, 2, 2]), (), "eps"),
    "KOALA-700M": (type_xl([0, 2, 5]), (), "eps"),
    "KOALA-1B": (type_xl([0, 2, 6]), (), "eps"),
}  # fmt: skip


def unet(config):
    """Random weights under a checkpoint's names."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    lists = {name: list(value) for name, value in config.items() if isinstance(value, list)}
    with torch.device("meta"):
        network = UNetModel(
            **config | lists, dtype=torch.float16, operations=comfy.ops.disable_weight_init
        )
    torch.manual_seed(0)
    return {
        f"model.diffusion_model.{name}": (0.05 * torch.randn(p.shape)).half()
        for name, p in network.named_parameters()
    }


def open_clip(prefix, width, layers):
    """A text encoder of zeros in open_clip's names."""
    shapes = {
        "positional_embedding": (77, width), "token_embedding.weight": (49408, width),
        "ln_final.weight": (width,), "ln_final.bias": (width,), "text_projection": (width, width),
    }  # fmt: skip
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for name, rows, columns in (
            ("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width), ("mlp.c_proj.", width, 4 * width),
        ):  # fmt: skip
            shapes |= {f"{block}.{name}weight": (rows, columns), f"{block}.{name}bias": (rows,)}
    return {prefix + name: torch.zeros(shape).half() for name, shape in shapes.items()}


def moved(tensors, old, new):
    return {new + key.removeprefix(old): v for key, v in tensors.items() if key.startswith(old)}


def load_and_train(checkpoint, tmp_path):
    """Loads the teacher, takes a training step, writes the LoRA; -> the teacher."""
    from lcm_lora.lora.formats import files
    from lcm_lora.tests.unit.toy_network import a_step
    from lcm_lora.training.adapter import Adapter
    from lcm_lora.training.export import vector
    from lcm_lora.training.host import load_teacher
    from lcm_lora.training.objectives import lcm

    teacher = load_teacher(checkpoint, "fp32")
    adapter = Adapter(teacher.network, 2, 2.0)
    texts = teacher.text("a photo of a bag")
    about = {name: value[None] for name, value in texts.items()}
    cond, uncond = teacher.conditions(about, torch.tensor([(64, 64, 0, 0, 64, 64)]))
    assert cond.keys() == uncond.keys()
    assert ("y" in cond) == teacher.has_sizes
    z0, eps = torch.randn(2, 1, 4, 8, 8).to(teacher.device)
    index = torch.tensor([30], device=teacher.device)
    batch = z0, eps, index, cond, uncond, 7.5
    loss = a_step(lcm.loss, teacher, adapter, teacher.schedule, *batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None for p in teacher.network.parameters())
    assert any(p.grad.abs().sum() > 0 for p in adapter.parameters())
    files.write(
        tmp_path / "lcm.safetensors",
        vector(adapter.state(), adapter.alpha, {}, "test"),
        "fp16",
        False,
    )
    assert teacher.unmatched(tmp_path / "lcm.safetensors") == []
    return teacher


@pytest.mark.faults
@pytest.mark.parametrize("case", FAMILIES)
def test_a_step_on_a_teacher_of_each_family(comfy, toy_checkpoint, tmp_path, case):
    config, marks, prediction = FAMILIES[case]
    toy = load_file(toy_checkpoint)
    tensors = unet(config) | moved(toy, "first_stage_model.", "first_stage_model.")
    if "num_classes" in config:
        tensors |= moved(toy, "cond_stage_model.", "conditioner.embedders.0.")
        tensors |= open_clip("conditioner.embedders.1.model.", 1280, 32)
        tensors |= {mark: torch.zeros(1) for mark in marks}
    else:
        tensors |= open_clip("cond_stage_model.model.", 1024, 24)
        # The host distinguishes the two kinds of SD2 by the spread of this bias.
        bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
        tensors[bias] = tensors[bias] * (4 if marks else 0.1)
    path = tmp_path / "teacher.safetensors"
    save_file(tensors, path)
    del tensors
    teacher = load_and_train(path, tmp_path)
    path.unlink()
    assert case.startswith(teacher.architecture)
    assert teacher.schedule.prediction == prediction
    assert (teacher.schedule.alphas_cumprod[-1] < 1e-6) == ("ztsnr" in marks)


def test_an_sd15_teacher(comfy, toy_checkpoint, tmp_path):
    teacher = load_and_train(toy_checkpoint, tmp_path)
    assert (teacher.architecture, teacher.schedule.prediction) == ("SD1.5", "eps")


@pytest.mark.parametrize("precision, near, along", [("bf16", 0.5, 0.8), ("fp16", 0.05, 0.98)])
def test_half_precision_gives_nearly_the_same_step(comfy, toy_checkpoint, precision, near, along):
    """Student and target are close, so that bfloat16's rounding shows in their difference."""
    from lcm_lora.tests.unit.toy_network import a_step
    from lcm_lora.training.adapter import Adapter
    from lcm_lora.training.host import load_teacher
    from lcm_lora.training.objectives import lcm
    from lcm_lora.training.teacher import DTYPES

    results = {}
    for dtype in ("fp32", precision):
        teacher = load_teacher(toy_checkpoint, dtype)
        assert next(teacher.network.parameters()).dtype == DTYPES[dtype]
        adapter = Adapter(teacher.network, 4, 4.0)
        about = {name: value[None] for name, value in teacher.text("a photo of a bag").items()}
        cond, uncond = teacher.conditions(about, torch.tensor([(64, 64, 0, 0, 64, 64)]))
        noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        z0, eps = noise.to(teacher.device)
        index = torch.tensor([30], device=teacher.device)
        batch = z0, eps, index, cond, uncond, 2.5
        loss = a_step(lcm.loss, teacher, adapter, teacher.schedule, *batch)
        loss.backward()
        grads = torch.cat([layer.up.grad.flatten() for layer in adapter.layers])
        assert grads.dtype == torch.float32
        results[dtype] = float(loss.detach()), grads
    (loss, grads), (full_loss, full_grads) = results[precision], results["fp32"]
    assert loss == pytest.approx(full_loss, rel=near)
    assert torch.cosine_similarity(grads, full_grads, 0) > along


def test_a_style_lora_is_baked_in_as_the_host_would_add_it(comfy, toy_checkpoint):
    import comfy.sd
    import comfy.utils
    from lcm_lora.dev.toy import assemble
    from lcm_lora.training.host import load_teacher
    from lcm_lora.training.spec import StyleLoRA

    style = StyleLoRA(str(assemble.lora(assemble.STICKER_LORA)), 0.8)
    teacher = load_teacher(toy_checkpoint, "fp32", (style,))
    parameters = dict(teacher.network.named_parameters())
    model = comfy.sd.load_checkpoint_guess_config(
        str(toy_checkpoint), model_options={"dtype": torch.float32}
    )[0]
    plain = {n: p.clone() for n, p in model.model.diffusion_model.named_parameters()}
    lora = comfy.utils.load_torch_file(style.path, safe_load=True)
    model = comfy.sd.load_lora_for_models(model, None, lora, style.strength, 0.0)[0]
    model.patch_model()
    changed = 0
    for name, expected in model.model.diffusion_model.named_parameters():
        baked, expected, before = (p.cpu() for p in (parameters[name], expected, plain[name]))
        assert torch.allclose(baked, expected, rtol=1e-5, atol=1e-6), name
        changed += not torch.equal(expected, before)
    assert changed > 10


def test_a_caption_may_name_an_embedding(comfy, toy_checkpoint, tmp_path):
    from lcm_lora.training.host import load_teacher

    second = tmp_path / "second"
    second.mkdir()
    save_file({"emb_params": torch.randn(2, 768)}, second / "mine.safetensors")
    with_it = load_teacher(toy_checkpoint, embeddings=(str(tmp_path), str(second)))
    context = with_it.text("a photo, embedding:mine")["context"]
    assert context.isfinite().all()
    assert not torch.equal(context, with_it.text("a photo,")["context"])


@pytest.mark.parametrize("channels", [8, 9])
def test_a_model_with_more_channels_is_refused_with_the_reason(
    comfy, toy_checkpoint, tmp_path, channels
):
    from lcm_lora.training.host import load_teacher

    tensors = load_file(toy_checkpoint)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = torch.cat([tensors[first]] * 3, 1)[:, :channels].contiguous()
    path = tmp_path / "inpainting.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"takes {channels} latent channels.*base model"):
        load_teacher(path)
    path.unlink()


def test_a_checkpoint_without_its_encoders_is_refused(comfy, toy_checkpoint, tmp_path):
    from lcm_lora.training.host import load_teacher

    path = tmp_path / "unet-only.safetensors"
    save_file(unet(ONE), path)
    with pytest.raises(ValueError, match="network, text encoder and VAE in one file"):
        load_teacher(path)
