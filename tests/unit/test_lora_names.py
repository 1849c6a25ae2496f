"""Every dialect's spelling of a module becomes the one of the official LCM-LoRA files."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.lora.formats.key_endings import split_key
from lcm_lora.lora.formats.module_names import canonical_names
from lcm_lora.lora.formats.parse import parse
from lcm_lora.lora.formats.places import host_name, places
from lcm_lora.lora.formats.wire import from_wire, to_wire

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
OUT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
TEXT = "lora_te_text_model_encoder_layers_3_self_attn_q_proj"


@pytest.mark.parametrize(
    ("key", "name", "part"),
    [
        (f"{Q}.lora_up.weight", Q, "up"),
        (f"{Q}.alpha", Q, "alpha"),
        (f"lycoris_{Q[10:]}.lora_mid.weight", Q, "mid"),
        (f"unet.{BLOCK}.attn1.to_q.lora_A.weight", Q, "down"),
        (f"unet.{BLOCK}.attn1.to_out.0.lora_B.weight", OUT, "up"),
        (f"unet.{BLOCK}.attn1.to_q.lora_A.default.weight", Q, "down"),
        (f"base_model.model.{BLOCK}.attn1.to_q.lora_B.lcm.weight", Q, "up"),
        (f"unet.base_model.model.{BLOCK}.attn1.to_q.lora_B.weight", Q, "up"),
        (f"unet.{BLOCK}.attn1.to_q.lora.down.weight", Q, "down"),
        (f"unet.{BLOCK}.attn1.processor.to_q_lora.up.weight", Q, "up"),
        (f"{BLOCK}.attn1.processor.to_out_lora.down.weight", OUT, "down"),
        (
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight",
            Q,
            "up",
        ),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0.alpha", OUT, "alpha"),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.up.weight",
            TEXT,
            "up",
        ),
        (
            "base_model.model.text_model.encoder.layers.3.self_attn.q_proj.lora_A.weight",
            TEXT,
            "down",
        ),
        ("text_encoder.encoder.layers.3.self_attn.q_proj.lora_A.weight", TEXT, "down"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.up.weight", TEXT, "up"),
        (
            "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj.lora_B.weight",
            TEXT.replace("te_", "te2_", 1),
            "up",
        ),
        ("diffusion_model.out.0.diff_b", "lora_unet_conv_norm_out", "diff_b"),
        ("base_model.model.conv_in.lora_A.weight", "lora_unet_conv_in", "down"),
        ("conv_norm_out.diff", "lora_unet_conv_norm_out", "diff"),
        ("unet.class_embedding.linear_1.alpha", "lora_unet_add_embedding_linear_1", "alpha"),
        (
            "diffusion_model.middle_block.2.in_layers.0.diff",
            "lora_unet_mid_block_resnets_1_norm1",
            "diff",
        ),
        ("diffusion_model.out.0.bias.diff", "lora_unet_conv_norm_out", "diff_b"),
        # Parts that compilers and data parallelism add to a path, at any place.
        (f"unet._orig_mod.{BLOCK}.attn1.to_q.lora_A.weight", Q, "down"),
        (f"_orig_mod.module.{BLOCK}.attn1.to_q.lora_A.weight", Q, "down"),
        (f"unet.module._orig_mod.{BLOCK}.attn1.to_q.lora_A.weight", Q, "down"),
        (f"unet.{BLOCK}.module._fsdp_wrapped_module.attn1.to_q.lora_A.weight", Q, "down"),
        (f"oft_unet_module_{Q[10:]}.alpha", Q, "alpha"),
        (f"unet.{BLOCK}.attn1.to_q.lokr_w1.default", Q, "lokr_w1"),
        (f"unet.{BLOCK}._orig_mod.attn1.to_q._orig_mod.lora_B.weight", Q, "up"),
        (f"base_model.model.{BLOCK}._fsdp_wrapped_module.attn1.to_q.lora_B.weight", Q, "up"),
        (f"unet.module.base_model.model.{BLOCK}.attn1.module.to_q.lora_B.default.weight", Q, "up"),
        (f"lora_unet__orig_mod_{Q[10:]}.alpha", Q, "alpha"),
        (f"{Q.replace('_attn1', '__orig_mod_attn1')}__orig_mod.lora_up.weight", Q, "up"),
        (f"lora_unet_module_{Q[10:]}.lora_up.weight", Q, "up"),
        (f"lora_unet_base_model_model_module_{Q[10:]}.lora_up.weight", Q, "up"),
        (f"_forward_module.{BLOCK}.attn1.to_q.lora_A.weight", Q, "down"),
        # Text encoders as OneTrainer, ComfyUI, checkpoints and transformers 5 call them.
        ("clip_l.text_model.encoder.layers.3.self_attn.q_proj.lora_up.weight", TEXT, "up"),
        ("text_encoders.clip_h.transformer.text_model.encoder.layers.3.self_attn.q_proj.diff",
         TEXT, "diff"),
        ("cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.q_proj.alpha",
         TEXT, "alpha"),
        ("base_model.model.encoder.layers.3.self_attn.q_proj.lora_A.weight", TEXT, "down"),
        ("lora_te1_text_model_encoder_layers_3_self_attn_q_proj.alpha", TEXT, "alpha"),
        ("lora_te_encoder_layers_3_self_attn_q_proj.alpha", TEXT, "alpha"),
        ("clip_g.text_projection.lora_up.weight", "lora_te2_text_projection", "up"),
        ("text_encoder_2.text_projection.lora_A.weight", "lora_te2_text_projection", "down"),
        ("text_encoder.embeddings.token_embedding.lora_embedding_A",
         "lora_te_text_model_embeddings_token_embedding", "embedding_A"),
        ("lora_te2_text_model_encoder_layers_9_layer_norm1.w_norm",
         "lora_te2_text_model_encoder_layers_9_layer_norm1", "diff"),
        # T5 is the second encoder of Flux and the third of SD3; it is not a CLIP.
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
         "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "down"),
        ("t5.encoder.block.0.layer.0.SelfAttention.q.alpha",
         "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "alpha"),
        ("lora_te2_encoder_block_0_layer_0_SelfAttention_q.alpha",
         "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "alpha"),
        # Only the host knows the names of other models.
        ("text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj.diff",
         "text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj", "diff"),
        ("lycoris_transformer_blocks_0_attn_to_out.alpha",
         "lycoris_transformer_blocks_0_attn_to_out", "alpha"),
        ("lora_unet__blocks_0_cross_attn_k.alpha", "lora_unet_blocks_0_cross_attn_k", "alpha"),
        ("diffusion_model.transformer.layers.0.self_attn.to_out.alpha",
         "lora_unet_transformer_layers_0_self_attn_to_out", "alpha"),
        ("base_model.model.joint_blocks.0.x.alpha", "base_model.model.joint_blocks.0.x", "alpha"),
    ],
)  # fmt: skip
def test_each_spelling_has_one_canonical_name(key, name, part):
    module, key_part = split_key(key)
    assert (canonical_names([module])[module], key_part) == (name, part)


@pytest.mark.parametrize("key", ["unet.conv_in.bias", "unet.conv_in.weight", "vae.alpha_x"])
def test_other_keys_are_no_part_of_a_lora(key):
    assert split_key(key) is None


SD15_NATIVE = {
    "input_blocks_0_0": "conv_in",
    "time_embed_2": "time_embedding_linear_2",
    "out_2": "conv_out",
    "input_blocks_2_1_proj_in": "down_blocks_0_attentions_1_proj_in",
    "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
    "input_blocks_4_0_skip_connection": "down_blocks_1_resnets_0_conv_shortcut",
    "input_blocks_11_0_in_layers_2": "down_blocks_3_resnets_1_conv1",
    "middle_block_0_out_layers_3": "mid_block_resnets_0_conv2",
    "middle_block_1_proj_out": "mid_block_attentions_0_proj_out",
    "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
    "output_blocks_2_1_conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
    "output_blocks_11_1_norm": "up_blocks_3_attentions_2_norm",
}
# One residual block per level, as in KOALA: conv_in, R, Down, R, Down, R.
KOALA_NATIVE = {
    "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
    "input_blocks_2_0_op": "down_blocks_0_downsamplers_0_conv",
    "input_blocks_3_1_proj_in": "down_blocks_1_attentions_0_proj_in",
    "input_blocks_5_1_proj_in": "down_blocks_2_attentions_0_proj_in",
    "output_blocks_1_2_conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks_4_0_in_layers_2": "up_blocks_2_resnets_0_conv1",
    "label_emb_0_2": "add_embedding_linear_2",
}


@pytest.mark.parametrize("layout", [SD15_NATIVE, KOALA_NATIVE])
def test_native_blocks_are_numbered_as_diffusers_does(layout):
    names = canonical_names(f"lora_unet_{native}" for native in layout)
    assert names == {f"lora_unet_{a}": f"lora_unet_{b}" for a, b in layout.items()}


@pytest.mark.parametrize(
    ("module", "of_two", "of_one"),
    [
        ("input_blocks_5_1_proj_in", "down_blocks_1_attentions_1", "down_blocks_2_attentions_0"),
        ("output_blocks_2_1_proj_in", "up_blocks_0_attentions_2", "up_blocks_1_attentions_0"),
    ],
)
def test_a_number_that_means_two_blocks_is_left_until_something_tells(module, of_two, of_one):
    name = f"lora_unet_{module}"
    for witness, block in {
        "": f"{module.removesuffix('_proj_in')}",
        "input_blocks_2_1_norm": of_two, "input_blocks_3_0_op": of_two,
        "output_blocks_8_1_norm": of_two, "output_blocks_2_2_conv": of_two,
        "middle_block_1_transformer_blocks_9_norm1": of_two, "up_blocks_0_resnets_2_conv1": of_two,
        "input_blocks_3_1_norm": of_one, "input_blocks_4_0_op": of_one,
        "output_blocks_1_2_conv": of_one,
    }.items():  # fmt: skip
        assert canonical_names([name, f"lora_unet_{witness}"])[name] == f"lora_unet_{block}_proj_in"


def test_layers_that_only_video_models_have_keep_their_names():
    names = [
        "lora_unet_input_blocks_2_1_time_stack_0_attn1_to_q", "lora_unet_input_blocks_2_1_norm",
        "lora_unet_input_blocks_2_0_time_stack_in_layers_0",
    ]  # fmt: skip
    canonical = canonical_names(names)
    assert [canonical[name] == name for name in names] == [True, False, True]


def test_names_of_other_models_are_kept():
    names = ["transformer.double_blocks.0.attn", "lora_unet_double_blocks_0_img_attn_qkv"]
    assert canonical_names(names) == {name: name for name in names}


def factors(module: str, up: str, down: str, out: int = 8, columns: int = 6) -> dict:
    generator = torch.Generator().manual_seed(out)
    return {
        f"{module}{up}": torch.randn(out, 2, generator=generator),
        f"{module}{down}": torch.randn(2, columns, generator=generator),
    }


def test_a_vector_comes_back_from_the_wire_as_it_was():
    tensors = factors(f"unet.{BLOCK}.attn1.to_q", ".lora_B.weight", ".lora_A.weight")
    vector = parse(tensors, {"note": "kept"}, "a.safetensors")
    wire = to_wire(vector)
    assert set(wire) == {f"{Q}.lora_up.weight", f"{Q}.lora_down.weight", f"{Q}.alpha"}
    assert wire[f"{Q}.alpha"].item() == 2.0, "no alpha is scale 1, which is alpha = rank"
    again = from_wire(wire)
    assert again.source == "a.safetensors" and again.metadata == {"note": "kept"}
    torch.testing.assert_close(again.deltas[Q].matrix(), vector.deltas[Q].matrix())


def test_the_hosts_trainer_is_understood():
    module = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    tensors = factors(module, ".lora_up.weight", ".lora_down.weight")
    tensors[f"{module}.alpha"] = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)
    tensors["diffusion_model.input_blocks.1.1.norm.diff"] = torch.ones(8)
    tensors["diffusion_model.input_blocks.1.1.norm.diff_b"] = torch.ones(8)
    vector = from_wire(tensors)
    assert vector.deltas[Q].scale == 0.5
    norm = "lora_unet_down_blocks_0_attentions_0_norm"
    assert set(vector.diffs) == {f"{norm}.diff", f"{norm}.diff_b"}


@pytest.mark.parametrize(
    ("name", "width", "path"),
    [
        ("lora_te_text_model_encoder_layers_3_layer_norm1", 768,
         "clip_l.transformer.text_model.encoder.layers.3.layer_norm1"),
        ("lora_te_text_model_final_layer_norm", 1024,
         "clip_h.transformer.text_model.final_layer_norm"),
        ("lora_te2_text_model_embeddings_token_embedding", 1280,
         "clip_g.transformer.text_model.embeddings.token_embedding"),
        ("lora_te1_text_model_embeddings_position_embedding", 6,
         "clip_l.transformer.text_model.embeddings.position_embedding"),
        ("lora_te_text_projection", 768, "clip_l.transformer.text_projection"),
    ],
)  # fmt: skip
def test_what_kohya_has_no_name_for_is_called_as_the_host_calls_it(name, width, path):
    assert host_name(name, width) == f"text_encoders.{path}"
    canonical = canonical_names([f"text_encoders.{path}"])[f"text_encoders.{path}"]
    assert canonical == name.replace("te1_", "te_")


@pytest.mark.parametrize("name", [Q, TEXT, "lora_te2_text_projection", "lora_te1_text_projection"])
def test_what_kohya_has_a_name_for_keeps_it(name):
    assert host_name(name, 1280) == name


def test_text_encoders_are_spelled_as_the_family_does():
    tensors = {}
    for module in ("text_encoder.text_model.encoder.layers.0.mlp.fc1", f"unet.{BLOCK}.attn2.to_k"):
        tensors |= factors(module, ".lora_B.weight", ".lora_A.weight", columns=2048)
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in parse(tensors, {}, "a").deltas


@pytest.mark.parametrize(
    "piece",
    ["on_input", "set_weight", "reshape_weight", "oft_diag", "ia3_l", "lora_E", "vera_lambda_b"]
    + ["boft_R", "hra_u", "fourierft_spectrum", "randlora_lambda", "shira_weight", "c3a_kernel"]
    + ["gralora_A", "hira_A", "miss_block", "road_theta", "lambda_layer", "poly_lora_A"],
)
def test_adapters_that_are_not_known_are_named_and_refused(piece):
    tensors = factors(Q, ".lora_up.weight", ".lora_down.weight") | {f"{Q}.{piece}": torch.ones(2)}
    with pytest.raises(ValueError, match=r"a holds .* weights, which these nodes do not support"):
        parse(tensors, {}, "a")


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ({"dora_scale": (8,)}, "DoRA"),
        ({"lora_magnitude_vector": (8,)}, "DoRA"),
        ({"lora_magnitude_vector.default.weight": (8,)}, "DoRA"),
        ({"lora_magnitude_vector.my_adapter": (8,)}, "DoRA"),
        ({"oft_blocks": (2, 4, 4), "rescale": (8, 1)}, "OFT or BOFT"),
        (
            {"a1.weight": (9, 2), "a2.weight": (2, 9), "b1.weight": (8, 2), "b2.weight": (2, 9)},
            "GLoRA",
        ),
    ],
)
def test_what_is_no_sum_is_kept_for_the_host_and_not_combined(pieces, kind):
    from lcm_lora.lora.combine import exact

    tensors = factors(Q, ".lora_up.weight", ".lora_down.weight") if kind == "DoRA" else {}
    tensors |= {f"{Q}.{piece}": torch.ones(shape) for piece, shape in pieces.items()}
    vector = parse(tensors, {}, "a")
    assert vector.opaque_kinds == kind and vector.modules() == {Q} and not vector.deltas
    wire = to_wire(vector)
    assert len(wire) == len(tensors)
    assert (f"{Q}.dora_scale" in wire) == (kind == "DoRA")
    assert from_wire(wire).opaque.keys() == {Q}
    with pytest.raises(ValueError, match=f"a holds {kind} weights.*Apply this file alone"):
        exact([vector], [1.0])


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ({"dora_scale": (8,)}, "no lora_up.weight beside it"),
        ({"dora_scale": (7,), "lora_up.weight": (8, 2), "lora_down.weight": (2, 6)}, "7 numbers"),
        ({"dora_scale": (8,), "hada_w1_a": (8, 2)}, "it has no hada_w1_b"),
        ({"rescale": (8,)}, "its oft_blocks are none"),
        ({"oft_blocks": (8, 1)}, r"its oft_blocks are \[8, 1\]"),
        ({"a1.weight": (9, 2)}, "a2.weight missing"),
        ({"lora_B.bias": (8,), "dora_scale": (8,)}, "a bias for its up factor"),
    ],
)
def test_half_of_a_module_that_is_no_sum_is_refused(pieces, says):
    tensors = {f"{Q}.{piece}": torch.ones(shape) for piece, shape in pieces.items()}
    with pytest.raises(ValueError, match=f"a, module {Q}: .*{says}"):
        parse(tensors, {}, "a")


def test_the_shape_of_a_dora_is_that_of_what_it_scales():
    core = {"lora_up.weight": (8, 2, 1, 1), "lora_down.weight": (2, 6, 1, 1)}
    core |= {"lora_mid.weight": (2, 2, 3, 3), "dora_scale": (8, 1, 1, 1)}
    vector = parse({f"{Q}.{piece}": torch.ones(shape) for piece, shape in core.items()}, {}, "a")
    assert vector.shapes == {Q: (8, 6, 3, 3)}


def test_two_spellings_of_one_module_in_one_file_are_refused():
    tensors = factors(Q, ".lora_up.weight", ".lora_down.weight")
    tensors |= factors(f"unet.{BLOCK}.attn1.to_q", ".lora_B.weight", ".lora_A.weight")
    with pytest.raises(ValueError, match=f"two LoRAs for the module {Q}"):
        parse(tensors, {}, "a")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TEXT, TEXT.replace("te_", "te1_")),
        (TEXT, "clip_l.text_model.encoder.layers.3.self_attn.q_proj"),
        (Q, f"unet._orig_mod.{BLOCK}.attn1.to_q"),
        ("lora_unet_input_blocks_2_1_proj_in", "lora_unet_down_blocks_0_attentions_1_proj_in"),
    ],
)
def test_no_spelling_hides_that_a_module_is_there_twice(one, other):
    tensors = factors(one, ".lora_up.weight", ".lora_down.weight")
    tensors |= factors(other, ".lora_up.weight", ".lora_down.weight")
    with pytest.raises(ValueError, match="two LoRAs for the module"):
        parse(tensors, {}, "a")


def test_two_tensors_of_one_part_are_refused():
    """This happens with two adapters in one file, for example."""
    tensors = factors(f"unet.{BLOCK}.attn1.to_q", ".lora_B.one.weight", ".lora_A.one.weight")
    tensors |= factors(f"unet.{BLOCK}.attn1.to_q", ".lora_B.two.weight", ".lora_A.two.weight")
    with pytest.raises(ValueError, match="attn1.to_q.lora_B.two.weight: .* two tensors for up"):
        parse(tensors, {}, "a")


def test_a_factor_without_its_partner_is_refused_by_name():
    tensors = factors(Q, ".lora_up.weight", ".lora_down.weight")
    del tensors[f"{Q}.lora_down.weight"]
    with pytest.raises(ValueError, match=f"a, module {Q}: it has no down factor"):
        parse(tensors, {}, "a")


def test_keys_that_are_no_lora_are_remembered():
    tensors = factors(Q, ".lora_up.weight", ".lora_down.weight") | {"bundle_emb.x": torch.ones(2)}
    assert parse(tensors, {}, "a").ignored == ("bundle_emb.x",)


def test_the_only_clip_of_a_model_takes_what_a_file_says_of_another():
    """The width of its layers shows which CLIP a file is for; models may vary it."""
    path = "transformer.text_model.final_layer_norm"
    alone = places({f"text_encoders.clip_h.{path}": "weight"})
    assert [alone[f"text_encoders.clip_{clip}.{path}"] for clip in "lgh"] == ["weight"] * 3
    two = {f"text_encoders.clip_l.{path}": "l", f"text_encoders.clip_g.{path}": "g"}
    assert f"text_encoders.clip_h.{path}" not in places(two)


@pytest.mark.parametrize("value", [1.0, None, "x"])
def test_a_value_of_another_node_that_is_not_a_tensor_is_refused_by_its_key(value):
    tensors = factors(Q, ".lora_up.weight", ".lora_down.weight") | {f"{Q}.alpha": value}
    with pytest.raises(ValueError, match=rf"has a \w+ under {Q}.alpha; expected a tensor"):
        from_wire(tensors)
