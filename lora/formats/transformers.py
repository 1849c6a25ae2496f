"""The transformers that ComfyUI knows, and the two names that their layers have.

ComfyUI uses the names of a model's authors. diffusers has other names, and splits layers that the
authors keep whole: the rows of `double_blocks.0.img_attn.qkv` are `attn.to_q`, `attn.to_k` and
`attn.to_v` of `transformer_blocks.0`. A table for each kind of transformer lists both names. Paths
here are flat: `_` joins their levels instead of dots, as in kohya's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from .module_names import NO_LAYER

Shapes = Mapping[str, Sequence[int]]
Table = Mapping[str, tuple[str, Mapping[str, str]]]
"""diffusers' block -> (the authors' block, {diffusers' layer: the authors' layer}). `#` is the
number of the block. A key with several names lists the parts of one layer of the authors, in the
order of their rows; `*4` means four times as many rows, and `-` a part without a name. `~` means
that the halves are swapped."""

# The dialects' prefixes: kohya, OneTrainer, SimpleTuner, diffusers, ComfyUI, PEFT,
# DiffSynth-Studio, HunyuanVideo-I2V, or none.
_PREFIX = re.compile(
    r"(?:lora|oft)_unet_+|lora_transformer_|lycoris_|(?:unet\.)?base_model\.model\.|transformer\."
    r"|(?:model\.)?diffusion_model\.|unet\.|pipe\.dit\.|Hunyuan_video_I2V_lora_"
)
_SPLIT = "attn.to_q attn.to_k attn.to_v"
_SPLIT_TEXT = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_TIMES = {
    f"time_text_embed.{theirs}.linear_{number}": f"{ours}.{layer}"
    for theirs, ours in {
        "timestep_embedder": "time_in",
        "text_embedder": "vector_in",
        "guidance_embedder": "guidance_in",
    }.items()
    for number, layer in ((1, "in_layer"), (2, "out_layer"))
}
_STREAMS = {
    _SPLIT: "img_attn.qkv",
    _SPLIT_TEXT: "txt_attn.qkv",
    "attn.to_qkv": "img_attn.qkv",  # where its projections are fused
    "attn.to_added_qkv": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    **{f"ff.{name}": "img_mlp.0" for name in ("net.0.proj", "linear_in")},
    **{f"ff.{name}": "img_mlp.2" for name in ("net.2", "linear_out")},
    **{f"ff_context.{name}": "txt_mlp.0" for name in ("net.0.proj", "linear_in")},
    **{f"ff_context.{name}": "txt_mlp.2" for name in ("net.2", "linear_out")},
}
_SINGLE_STREAM = {
    "attn.to_qkv_mlp_proj": "linear1",
    "proj_out": "linear2",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_FLUX_ENDS = _TIMES | {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "~final_layer.adaLN_modulation.1",
}
_FLUX: Table = {
    "transformer_blocks.#": ("double_blocks.#", _STREAMS | {
        "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    }),
    "single_transformer_blocks.#": ("single_blocks.#", _SINGLE_STREAM | {
        f"{_SPLIT} proj_mlp*4": "linear1", "norm.linear": "modulation.lin",
    }),
    # A name of ComfyUI's for the first rows (USO's LoRAs).
    "diffusion_model.single_blocks.#": ("single_blocks.#", {"linear1_qkv*3 -*4": "linear1"}),
    "": ("", _FLUX_ENDS),
}  # fmt: skip
# Chroma has no modulation, and no embedding of time, guidance or pooled text.
_CHROMA: Table = {
    block: (own, {k: v for k, v in names.items() if not re.search(r"mod|_in\..*layer", v)})
    for block, (own, names) in _FLUX.items()
}
_FLUX2: Table = {
    "transformer_blocks.#": ("double_blocks.#", _STREAMS),
    # ComfyUI also takes the names of the first Flux.
    "single_transformer_blocks.#": ("single_blocks.#", _SINGLE_STREAM | {
        f"{_SPLIT} proj_mlp*4 -*2": "linear1",
    }),
    "diffusion_model.single_blocks.#": ("single_blocks.#", {"linear1_qkv*3 -*6": "linear1"}),
    "": ("", _FLUX_ENDS),
}  # fmt: skip
_SD3: Table = {
    "transformer_blocks.#": ("joint_blocks.#", {
        _SPLIT: "x_block.attn.qkv", _SPLIT_TEXT: "context_block.attn.qkv",
        "attn2.to_q attn2.to_k attn2.to_v": "x_block.attn2.qkv",
        "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
    }),
    "": ("", {
        "context_embedder": "context_embedder", "pos_embed.proj": "x_embedder.proj",
        "proj_out": "final_layer.linear", "norm_out.linear": "~final_layer.adaLN_modulation.1",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    }),
}  # fmt: skip
_PIXART: Table = {
    "transformer_blocks.#": ("blocks.#", {
        "attn1.to_q attn1.to_k attn1.to_v": "attn.qkv", "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear", "attn2.to_k attn2.to_v": "cross_attn.kv_linear",
        "attn2.to_out.0": "cross_attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
    }),
    "": ("", {
        "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.linear": "t_block.1",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
        "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
        "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
        "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
    }),
}  # fmt: skip
_AURA: Table = {
    "joint_transformer_blocks.#": ("double_layers.#", {
        "attn.to_q": "attn.w2q", "attn.to_k": "attn.w2k", "attn.to_v": "attn.w2v",
        "attn.to_out.0": "attn.w2o", "attn.add_q_proj": "attn.w1q", "attn.add_k_proj": "attn.w1k",
        "attn.add_v_proj": "attn.w1v", "attn.to_add_out": "attn.w1o",
        "ff.linear_1": "mlpX.c_fc1", "ff.linear_2": "mlpX.c_fc2",
        "ff.out_projection": "mlpX.c_proj", "ff_context.linear_1": "mlpC.c_fc1",
        "ff_context.linear_2": "mlpC.c_fc2", "ff_context.out_projection": "mlpC.c_proj",
        "norm1.linear": "modX.1", "norm1_context.linear": "modC.1",
    }),
    "single_transformer_blocks.#": ("single_layers.#", {
        "attn.to_q": "attn.w1q", "attn.to_k": "attn.w1k", "attn.to_v": "attn.w1v",
        "attn.to_out.0": "attn.w1o", "norm1.linear": "modCX.1", "ff.linear_1": "mlp.c_fc1",
        "ff.linear_2": "mlp.c_fc2", "ff.out_projection": "mlp.c_proj",
    }),
    "": ("", {
        "time_step_proj.linear_1": "t_embedder.mlp.0",
        "time_step_proj.linear_2": "t_embedder.mlp.2",
        "context_embedder": "cond_seq_linear", "pos_embed.proj": "init_x_linear",
        "proj_out": "final_linear", "norm_out.linear": "~modF.1",
    }),
}  # fmt: skip
_Z_BLOCK = {
    "attention.to_q attention.to_k attention.to_v": "attention.qkv",
    "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
}
_Z_IMAGE: Table = {
    **{f"{b}.#": (f"{b}.#", _Z_BLOCK) for b in ("layers", "context_refiner", "noise_refiner")},
    "": ("", {
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
        "all_x_embedder.2-1": "x_embedder",
    }),
}  # fmt: skip
_KREA_BLOCK = {
    "attn.to_q": "attn.wq", "attn.to_k": "attn.wk", "attn.to_v": "attn.wv",
    "attn.to_gate": "attn.gate", "attn.to_out.0": "attn.wo", "attn.to_out": "attn.wo",
    "ff.gate": "mlp.gate", "ff.up": "mlp.up", "ff.down": "mlp.down",
}  # fmt: skip
_KREA2: Table = {
    "transformer_blocks.#": ("blocks.#", _KREA_BLOCK),
    "text_fusion.layerwise_blocks.#": ("txtfusion.layerwise_blocks.#", _KREA_BLOCK),
    "text_fusion.refiner_blocks.#": ("txtfusion.refiner_blocks.#", _KREA_BLOCK),
    "": ("", {
        "img_in": "first", "time_embed.linear_1": "tmlp.0", "time_embed.linear_2": "tmlp.2",
        "time_mod_proj": "tproj.1", "txt_in.linear_1": "txtmlp.1", "txt_in.linear_2": "txtmlp.3",
        "text_fusion.projector": "txtfusion.projector", "final_layer.linear": "last.linear",
    }),
}  # fmt: skip
_LUMINA_BLOCK = {
    # It has a third as many heads for keys and values as for queries.
    "attn.to_q*3 attn.to_k attn.to_v": "attention.qkv", "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm", "attn.norm_k": "attention.k_norm",
    **{f"feed_forward.linear_{n}": f"feed_forward.w{n}" for n in (1, 2, 3)},
    "norm1.linear": "adaLN_modulation.1",
}  # fmt: skip
_LUMINA2: Table = {
    f"{b}.#": (f"{b}.#", _LUMINA_BLOCK) for b in ("layers", "context_refiner", "noise_refiner")
}
_WAN_BLOCK = {
    f"{theirs}.{layer}": f"{ours}.{own}"
    for theirs, ours in {"attn1": "self_attn", "attn2": "cross_attn"}.items()
    for layer, own in {
        "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q",
        "norm_k": "norm_k", "add_k_proj": "k_img", "add_v_proj": "v_img",
        "norm_added_k": "norm_k_img",
    }.items()
} | {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3"}  # fmt: skip
_WAN: Table = {
    "blocks.#": ("blocks.#", _WAN_BLOCK),
    "vace_blocks.#": ("vace_blocks.#", _WAN_BLOCK | {
        "proj_in": "before_proj", "proj_out": "after_proj",
    }),
    "": ("", {
        **{
            f"condition_embedder.{kind}_embedder.linear_{number}": f"{kind}_embedding.{place}"
            for kind in ("text", "time") for number, place in ((1, 0), (2, 2))
        },
        "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    }),
}  # fmt: skip
_LTX: Table = {
    "transformer_blocks.#": ("transformer_blocks.#", {
        f"attn{n}.norm_{part}": f"attn{n}.{part}_norm" for n in (1, 2) for part in "qk"
    }),
    "": ("", {
        "proj_in": "patchify_proj", "time_embed.linear": "adaln_single.linear",
        **{
            f"time_embed.emb.timestep_embedder.linear_{n}":
            f"adaln_single.emb.timestep_embedder.linear_{n}" for n in (1, 2)
        },
    }),
}  # fmt: skip
# Tencent's own names, which differ from ComfyUI's in these layers only, and diffusers'.
_HUNYUAN: Table = {
    "double_blocks.#": ("double_blocks.#", {
        "img_mod.linear": "img_mod.lin", "img_mlp.fc1": "img_mlp.0", "img_mlp.fc2": "img_mlp.2",
        "txt_mod.linear": "txt_mod.lin", "txt_mlp.fc1": "txt_mlp.0", "txt_mlp.fc2": "txt_mlp.2",
    }),
    "single_blocks.#": ("single_blocks.#", {"modulation.linear": "modulation.lin"}),
    "txt_in.individual_token_refiner.blocks.#": (
        "txt_in.individual_token_refiner.blocks.#", {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    ),
    "transformer_blocks.#": ("double_blocks.#", _FLUX["transformer_blocks.#"][1]),
    "single_transformer_blocks.#": ("single_blocks.#", _SINGLE_STREAM | {
        f"{_SPLIT} proj_mlp*4": "linear1", "norm.linear": "modulation.lin",
    }),
    "context_embedder.token_refiner.refiner_blocks.#": (
        "txt_in.individual_token_refiner.blocks.#", {
            _SPLIT: "self_attn.qkv", "attn.to_out.0": "self_attn.proj", "ff.net.0.proj": "mlp.0",
            "ff.net.2": "mlp.2", "norm_out.linear": "adaLN_modulation.1",
        },
    ),
    "": ("", _TIMES | {
        "x_embedder.proj": "img_in.proj", "context_embedder.proj_in": "txt_in.input_embedder",
        "proj_out": "final_layer.linear", "norm_out.linear": "~final_layer.adaLN_modulation.1",
        **{
            f"context_embedder.time_text_embed.{theirs}.linear_{n}": f"txt_in.{ours}.{layer}"
            for theirs, ours in {
                "timestep_embedder": "t_embedder", "text_embedder": "c_embedder",
            }.items()
            for n, layer in ((1, "in_layer"), (2, "out_layer"))
        },
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A layer of a transformer, or a part of one.

    Attributes:
        path: the authors' flat path of the layer.
        rows: for a part, (its first row, its number of rows, the rows of the whole layer).
        swapped: whether its halves are in the other order than in the layer.
        name: the name of a part or a swapped layer that ComfyUI's loader knows.
    """

    path: str
    rows: tuple[int, int, int] | None = None
    swapped: bool = False
    name: str = ""

    @property
    def is_whole(self) -> bool:
        return self.rows is None and not self.swapped


@dataclass(frozen=True)
class _Layer:
    path: str
    dotted: str
    before: int = 0
    size: int = 0  # of `total`; 0 if the layer is whole
    total: int = 0
    swapped: bool = False


@dataclass(frozen=True)
class Transformer:
    """A kind of transformer.

    Attributes:
        name: for people, such as "Flux".
        own: matches the authors' flat paths of its layers.
        inputs: matches the layers whose number of inputs is the width of the model.
        table: diffusers' names.
        widths: of the published models; empty if any width is possible.
        blocks: how many blocks of each name the published models have.
        rows: the ratio of outputs to inputs of some layers, by the ends of their paths.
        has_parts: whether ComfyUI knows the parts of its layers by diffusers' names.
    """

    name: str
    own: re.Pattern[str]
    inputs: re.Pattern[str]
    table: Table = field(default_factory=dict, hash=False)
    widths: frozenset[int] = frozenset()
    blocks: Mapping[str, int] = field(default_factory=dict, hash=False)
    rows: Mapping[str, int] = field(default_factory=dict, hash=False)
    has_parts: bool = True

    def place(self, path: str, shape: Sequence[int]) -> Place | None:
        """The layer with a flat path in any spelling. None if this kind of model has none.

        shape: [out, ...] of the module, which shows the rows of a part.
        """
        for root, number, rest in _splits(path):
            layer = _layers(self).get((root, rest))
            if layer is None:
                continue
            own, dotted = (text.replace("#", number) for text in (layer.path, layer.dotted))
            # diffusers swaps the halves of SD3's last norm1_context, which has 2 parts, not 6.
            is_last = own.endswith("context_block_adaLN_modulation_1") and len(shape) > 1
            swapped = layer.swapped or (is_last and shape[0] == 2 * shape[1])
            if not layer.size and not swapped:
                return Place(own)
            rows = None
            if layer.size:
                if not shape or shape[0] % layer.size:
                    return None
                unit = shape[0] // layer.size
                rows = layer.before * unit, shape[0], layer.total * unit
            return Place(own, rows, swapped, dotted)
        return Place(path) if self.own.fullmatch(path) else None


def _pattern(*paths: str) -> re.Pattern[str]:
    return re.compile("|".join(path.replace("#", r"\d+") for path in paths))


_FLUX_OWN = (
    r"double_blocks_#_(?:img|txt)_(?:attn_(?:qkv|proj)|mlp_[02])",
    r"single_blocks_#_linear[12]",
    r"(?:img|txt)_in|final_layer_linear",
)
_FLUX_MODULATION = (
    r"double_blocks_#_(?:img|txt)_mod_lin",
    r"single_blocks_#_modulation_lin",
    r"(?:time|vector|guidance)_in_(?:in|out)_layer|final_layer_adaLN_modulation_1",
)
_FLUX_INPUTS = _pattern(
    r"double_blocks_#_(?:img|txt)_attn_(?:qkv|proj)", r"single_blocks_#_linear1"
)
_FLUX_BLOCKS = {
    "double_blocks": 19, "single_blocks": 38, "transformer_blocks": 19,
    "single_transformer_blocks": 38,
}  # fmt: skip
_FLUX_ROWS = {"_linear1": 7, "_mlp_0": 4}
_HUNYUAN_BLOCKS = {
    "double_blocks": 20, "single_blocks": 40, "transformer_blocks": 20,
    "single_transformer_blocks": 40,
}  # fmt: skip
_HUNYUAN_OWN = (
    *_FLUX_OWN,
    *_FLUX_MODULATION,
    r"img_in_proj|time_r_in_\w+|byt5_in_\w+|vision_in_\w+|cond_type_embedding",
    r"txt_in_(?:individual_token_refiner|input_embedder|[ct]_embedder)\w*",
)
_NEXT_DIT = (
    r"(?:layers|context_refiner|noise_refiner)_#_"
    r"(?:attention_(?:qkv|out)|feed_forward_w[123]|adaLN_modulation_[01])",
    r"x_embedder|cap_embedder_[01]|t_embedder_mlp_[02]|final_layer_(?:linear|adaLN_modulation_1)",
)
_NEXT_INPUTS = _pattern(r"\w+_#_attention_(?:qkv|out)", r"\w+_#_feed_forward_w[13]")

TRANSFORMERS = (
    Transformer(
        "Flux", _pattern(*_FLUX_OWN, *_FLUX_MODULATION), _FLUX_INPUTS, _FLUX, frozenset({3072}),
        _FLUX_BLOCKS, _FLUX_ROWS,
    ),
    Transformer(
        "Chroma", _pattern(*_FLUX_OWN, r"distilled_guidance_layer_\w+"), _FLUX_INPUTS,
        _CHROMA, frozenset({3072}), _FLUX_BLOCKS, _FLUX_ROWS,
    ),
    Transformer(
        "Flux2",
        _pattern(
            *_FLUX_OWN, r"(?:time|guidance)_in_(?:in|out)_layer|final_layer_adaLN_modulation_1",
            r"(?:double_stream_modulation_(?:img|txt)|single_stream_modulation)_lin",
        ),
        _FLUX_INPUTS, _FLUX2, frozenset({3072, 4096, 6144}),
        {
            "double_blocks": 8, "single_blocks": 48, "transformer_blocks": 8,
            "single_transformer_blocks": 48,
        },
        {"_linear1": 9, "_mlp_0": 6},
    ),
    Transformer(
        "HunyuanVideo", _pattern(*_HUNYUAN_OWN), _FLUX_INPUTS, _HUNYUAN, frozenset({3072}),
        _HUNYUAN_BLOCKS, _FLUX_ROWS, has_parts=False,
    ),
    Transformer(
        "HunyuanImage", _pattern(*_HUNYUAN_OWN), _FLUX_INPUTS, _HUNYUAN, frozenset({3584}),
        _HUNYUAN_BLOCKS, _FLUX_ROWS, has_parts=False,
    ),
    Transformer(
        "SD3",
        _pattern(
            r"joint_blocks_#_(?:x|context)_block_"
            r"(?:attn2?_(?:qkv|proj)|mlp_fc[12]|adaLN_modulation_1)",
            r"context_embedder|x_embedder_proj|[ty]_embedder_mlp_[02]",
            r"final_layer_(?:linear|adaLN_modulation_1)",
        ),
        _pattern(r"joint_blocks_#_(?:x|context)_block_attn2?_(?:qkv|proj)"),
        _SD3, frozenset({1536, 2432}),
    ),
    Transformer(
        "AuraFlow",
        _pattern(
            r"(?:double|single)_layers_#_(?:attn_w[12][qkvo]|mlp[XC]?_c_(?:fc[12]|proj)|mod\w+_1)",
            r"cond_seq_linear|init_x_linear|final_linear|modF_1|t_embedder_mlp_[02]",
        ),
        _pattern(r"(?:double|single)_layers_#_attn_w[12][qkvo]"), _AURA, frozenset({3072}),
    ),
    Transformer(
        "PixArt",
        _pattern(
            r"blocks_#_(?:attn_(?:qkv|proj)|cross_attn_(?:q_linear|kv_linear|proj)|mlp_fc[12])",
            r"(?:x_embedder|y_embedder_y)_proj\w*|\w+_embedder_mlp_[02]|t_block_1",
            r"final_layer_linear",
        ),
        _pattern(r"blocks_#_(?:attn|cross_attn)_(?:qkv|proj|q_linear)"), _PIXART, frozenset({1152}),
    ),
    Transformer("Z-Image", _pattern(*_NEXT_DIT), _NEXT_INPUTS, _Z_IMAGE, frozenset({3840})),
    Transformer(
        "Lumina2", _pattern(*_NEXT_DIT), _NEXT_INPUTS, _LUMINA2, frozenset({2304}), has_parts=False
    ),
    Transformer(
        "Qwen-Image",
        _pattern(
            r"transformer_blocks_#_attn_(?:to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)",
            r"transformer_blocks_#_(?:img|txt)_(?:mlp_net_(?:0_proj|2)|mod_1)",
            r"(?:img|txt)_in|proj_out|norm_out_linear|time_text_embed_timestep_embedder_linear_[12]",
        ),
        _pattern(r"transformer_blocks_#_attn_\w+"), {}, frozenset({3072}),
        {"transformer_blocks": 60},
    ),
    Transformer(
        "Krea2",
        _pattern(
            r"(?:txtfusion_\w+_)?blocks_#_(?:attn_(?:w[qkvo]|gate)|mlp_(?:gate|up|down))",
            r"first|tmlp_[02]|tproj_1|txtmlp_[13]|txtfusion_projector|last_linear",
        ),
        _pattern(r"blocks_#_attn_(?:w[qkv]|gate)"), _KREA2, frozenset({6144}),
    ),
    Transformer(
        "Wan",
        _pattern(
            r"(?:vace_)?blocks_#_(?:(?:self|cross)_attn_(?:[qkvo]|[kv]_img)|ffn_[02]|\w+_proj)",
            r"(?:text|time)_embedding_[02]|time_projection_1|head_head|img_emb_\w+|patch_embedding",
        ),
        _pattern(r"blocks_#_(?:self|cross)_attn_[qo]"), _WAN, frozenset({1536, 3072, 5120}),
    ),
    Transformer(
        "Cosmos-Predict2",
        _pattern(
            r"blocks_#_(?:self|cross)_attn_(?:[qkv]_proj|output_proj)",
            r"blocks_#_(?:mlp_layer[12]|adaln_modulation_\w+_[12])",
            r"x_embedder_\w+|t_embedder_\w+|final_layer_\w+",
        ),
        _pattern(r"blocks_#_self_attn_\w+"),
    ),
    Transformer(
        "Anima",
        _pattern(
            r"blocks_#_(?:self|cross)_attn_(?:[qkv]_proj|output_proj)",
            r"blocks_#_(?:mlp_layer[12]|adaln_modulation_\w+_[12])",
            r"x_embedder_\w+|t_embedder_\w+|final_layer_\w+|llm_adapter_\w+",
        ),
        _pattern(r"blocks_#_self_attn_\w+"), {}, frozenset({2048}),
    ),
    Transformer(
        "HiDream",
        _pattern(
            r"(?:double|single)_stream_blocks_#_block_\w+",
            r"[tpx]_embedder_\w+|caption_projection_\w+|final_layer_\w+",
        ),
        _pattern(r"\w+_stream_blocks_#_block_attn1_to_[qkv](?:_t)?"),
    ),
    Transformer(
        "Omnigen2",
        _pattern(
            r"(?:layers|(?:context|noise|ref_image)_refiner)_#_"
            r"(?:attn_to_(?:[qkv]|out_0)|feed_forward_linear_[123]|norm1_linear)",
            r"x_embedder|ref_image_patch_embedder|time_caption_embed_\w+|norm_out_\w+",
        ),
        _pattern(r"\w+_#_attn_to_[qkv]"),
    ),
    Transformer(
        "LTX-Video",
        _pattern(
            r"transformer_blocks_#_(?:attn[12]_to_(?:[qkv]|out_0)|ff_net_(?:0_proj|2))",
            r"adaln_single_\w+|caption_projection_linear_[12]|patchify_proj|proj_out",
        ),
        _pattern(r"transformer_blocks_#_attn1_to_\w+"), _LTX, frozenset({2048, 4096}),
    ),
    Transformer(
        "Kandinsky5",
        _pattern(r"(?:text|visual)_transformer_blocks_#_\w+", r"\w+_embeddings_\w+|out_layer_\w+"),
        _pattern(r"\w+_transformer_blocks_#_self_attention_to_\w+"),
    ),
    Transformer(
        "Ernie-Image",
        _pattern(
            r"layers_#_(?:self_attention_to_(?:[qkv]|out_0)|mlp_\w+)",
            r"text_proj|time_embedding_linear_[12]|x_embedder_proj|adaLN_modulation_1|final_\w+",
        ),
        _pattern(r"layers_#_self_attention_to_\w+"),
    ),
    Transformer(
        "HunyuanDiT",
        _pattern(
            r"blocks_#_(?:attn1_(?:Wqkv|out_proj)|attn2_(?:q_proj|kv_proj|out_proj)|mlp_fc[12])",
            r"blocks_#_(?:default_modulation_1|skip_linear)|mlp_t5_[02]|pooler_\w+",
            r"(?:extra|t|x)_embedder_\w+|final_layer_\w+",
        ),
        _pattern(r"blocks_#_attn1_\w+"), {}, frozenset({1408}),
    ),
)  # fmt: skip
"""The kinds that this pack recognises from a file. ComfyUI runs more kinds."""
_BLOCK_NUMBER = re.compile(r"((?:(?:single_)?transformer|double|single)_blocks)_(\d+)_")


def flat(module: str) -> str:
    """The flat path in a module's name of any dialect."""
    # Some files add a `_` to the end.
    return _PREFIX.sub("", module, count=1).replace(".", "_").rstrip("_")


def recognised(shapes: Shapes) -> tuple[tuple[Transformer, ...], int | None]:
    """(the kinds that all these modules fit, the width of their model). Several kinds if the
    modules fit several; none if they fit none, or if there are no layers of blocks.

    shapes: of the modules of the model, without text encoders, by names of any dialect.
    """
    paths = {
        path: tuple(shape)
        for name, shape in shapes.items()
        if len(shape) > 1 and not NO_LAYER.fullmatch(path := flat(name))
    }
    # Without layers of blocks, the kind is unknown: different models name their embeddings alike.
    has_blocks = any(map(_NUMBERED.fullmatch, paths))
    numbers = _last_blocks(paths)
    kinds = [kind for kind in TRANSFORMERS if has_blocks and _fits(kind, paths, numbers)]
    width = next((w for kind in kinds if (w := _width(kind, paths))), None)
    sized = [kind for kind in kinds if width in kind.widths]
    kinds = sized or kinds
    # If the modules have exactly the depth of a published model, they are for that model.
    whole = [
        kind
        for kind in kinds
        if numbers and all(kind.blocks.get(b) == last + 1 for b, last in numbers.items())
    ]
    return tuple(whole or kinds), width


def called(name: str) -> tuple[Transformer, ...]:
    """The kind of this name; none if files for this kind of model are not recognised."""
    return tuple(kind for kind in TRANSFORMERS if kind.name == name)


def is_known(name: str) -> bool:
    """Whether files for this kind of model are recognised."""
    return bool(called(name))


def width_of(name: str, shapes: Shapes) -> int | None:
    """The width of a model whose kind is known by name."""
    paths = {flat(module): shape for module, shape in shapes.items() if len(shape) > 1}
    return next((_width(kind, paths) for kind in called(name)), None)


def _fits(kind: Transformer, paths: Shapes, numbers: Mapping[str, int]) -> bool:
    """Whether a kind of model has all these layers. numbers: the last block of each name."""
    if any(last >= kind.blocks.get(block, last + 1) for block, last in numbers.items()):
        return False
    rows: dict[str, int] = {}
    for path, shape in paths.items():
        place = kind.place(path, shape)
        if place is None:
            return False
        count = shape[0] if place.rows is None else place.rows[2]
        times = next((n for end, n in kind.rows.items() if place.path.endswith(end)), 0)
        if rows.setdefault(place.path, count) != count or (times and count != times * shape[1]):
            return False
    return True


def _width(kind: Transformer, paths: Shapes) -> int | None:
    """The width of the model, from the inputs of its attention."""
    for path, shape in paths.items():
        place = kind.place(path, shape)
        if place and kind.inputs.fullmatch(place.path):
            return shape[1]
    return None


def _last_blocks(paths: Iterable[str]) -> dict[str, int]:
    """The highest number of each kind of block."""
    last: dict[str, int] = {}
    for path in paths:
        if match := _BLOCK_NUMBER.match(path):
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return last


_NUMBERED = re.compile(r"(.*?(?:blocks|layers|refiner))_(\d+)_(.+)")


def _splits(path: str) -> Iterable[tuple[str, str, str]]:
    """(block, its number, the rest), or ("", "", the whole path)."""
    yield "", "", path
    if match := _NUMBERED.fullmatch(path):
        yield match[1], match[2], match[3]


@cache
def _layers(kind: Transformer) -> dict[tuple[str, str], _Layer]:
    """The table of a kind by flat paths: of the block without its number, and within the block."""
    layers: dict[tuple[str, str], _Layer] = {}
    for block, (own, names) in kind.table.items():
        root = flat(block).removesuffix("_#")
        prefix = "" if block.startswith("diffusion_model.") else "transformer."
        for diffusers_layers, authors_layer in names.items():
            parts = [part.partition("*") for part in diffusers_layers.split()]
            sizes = [int(times or 1) for _, _, times in parts]
            swapped = authors_layer.startswith("~")
            path = ".".join(filter(None, (own, authors_layer.removeprefix("~")))).replace(".", "_")
            for at, (name, _, _) in enumerate(parts):
                dotted = prefix + ".".join(filter(None, (block, name)))
                size = (sum(sizes[:at]), sizes[at], sum(sizes)) if len(parts) > 1 else (0, 0, 0)
                layers[root, name.replace(".", "_")] = _Layer(path, dotted, *size, swapped)
    return layers
