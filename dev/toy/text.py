"""The toy's text encoder: a CLIP-L of the right shape whose weights are drawn from a fixed seed.

Random, but deterministic: different captions get different, well spread features, and the UNet
learns to read those. It is never stored (246 MB), only drawn again, from raw generator bits so that
every NumPy and every machine draws the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch

SEED = 20231109
WIDTH, LAYERS, TOKENS, LENGTH = 768, 12, 49408, 77


def _shapes() -> dict[str, tuple[tuple[int, ...], float]]:
    """name -> (shape, standard deviation); deviations are those CLIP itself starts from."""
    inner, residual = WIDTH**-0.5, (2 * LAYERS) ** -0.5
    shapes = {
        "embeddings.token_embedding.weight": ((TOKENS, WIDTH), 0.02),
        "embeddings.position_embedding.weight": ((LENGTH, WIDTH), 0.01),
    }
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}."
        for name in ("q", "k", "v"):
            shapes[f"{at}self_attn.{name}_proj.weight"] = ((WIDTH, WIDTH), inner * residual)
        shapes[f"{at}self_attn.out_proj.weight"] = ((WIDTH, WIDTH), inner)
        shapes[f"{at}mlp.fc1.weight"] = ((4 * WIDTH, WIDTH), (2 * WIDTH) ** -0.5)
        shapes[f"{at}mlp.fc2.weight"] = ((WIDTH, 4 * WIDTH), inner * residual)
    return shapes


def state_dict() -> dict[str, torch.Tensor]:
    """The whole encoder, float16, under the names it has inside an SD1.5 checkpoint."""
    bits = np.random.PCG64(SEED)
    prefix = "cond_stage_model.transformer.text_model."
    state = {}
    for name, (shape, std) in _shapes().items():
        count = shape[0] * shape[1]
        raw = torch.from_numpy(bits.random_raw(count // 4).astype("<u8").view("<i2"))
        # A uniform draw over +-w has the deviation w / sqrt(3).
        state[prefix + name] = (raw.float() * (std * 3**0.5 / 2**15)).reshape(shape).half()
        if name.startswith("encoder"):
            state[prefix + name.removesuffix("weight") + "bias"] = torch.zeros(shape[0]).half()
    norms = ["final_layer_norm"]
    norms += [f"encoder.layers.{n}.layer_norm{k}" for n in range(LAYERS) for k in (1, 2)]
    for name in norms:
        state[f"{prefix}{name}.weight"] = torch.ones(WIDTH).half()
        state[f"{prefix}{name}.bias"] = torch.zeros(WIDTH).half()
    return state
