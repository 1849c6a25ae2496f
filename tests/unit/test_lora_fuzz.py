"""Broken LoRA files: each is read rightly or refused with a sentence, soon and in little memory.

Files are made valid and then hurt in their bytes, their header and their tensors. Hypothesis makes
the choices, so that it can tell the least of them that fails; they are the same in every run.
`python3 dev faults` tries 20,000 files.
"""

import json
import math
import random
import struct
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lcm_lora.lora.combine import exact
from lcm_lora.lora.formats.describe import describe
from lcm_lora.lora.formats.files import read
from lcm_lora.lora.formats.peft_config import PEFT_METADATA
from lcm_lora.lora.opaque import merged, misfit
from lcm_lora.lora.reduce import truncated

resource = pytest.importorskip("resource", reason="only POSIX tells a process's memory")
MODULES = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    "unet.up_blocks.0.resnets.0.conv1",
    "diffusion_model.input_blocks.1.1.proj_in",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
)
PARTS = (
    ".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".alpha", ".lora_A.weight",
    ".lora_B.weight", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".lokr_w1",
    ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2", ".rescale", ".diff", ".diff_b",
    ".dora_scale", ".oft_blocks", ".lora_magnitude_vector", ".magnitude", ".a1.weight",
    ".a2.weight", ".b1.weight", ".b2.weight", ".bm.weight", "",
)  # fmt: skip
LORA = {".lora_up.weight": [6, 2], ".lora_down.weight": [2, 5], ".alpha": []}
# Complete modules for a layer [6, 5].
WHOLE = (
    LORA, LORA, LORA,
    LORA | {".dora_scale": [6, 1]}, LORA | {".dora_scale": [1, 5]}, LORA | {".magnitude": [6]},
    {".oft_blocks": [2, 3, 3], ".rescale": [6, 1], ".alpha": []},
    {".oft_blocks": [1, 3, 2, 2], ".alpha": []},
    {".a1.weight": [5, 2], ".a2.weight": [2, 5], ".b1.weight": [6, 2], ".b2.weight": [2, 5]},
    {".lokr_w1": [2, 1], ".lokr_w2_a": [3, 2], ".lokr_w2_b": [2, 5], ".dora_scale": [6, 1]},
)  # fmt: skip
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
NUMBERS = (0, 1, -1, 2**31, 2**63 - 1, 2**64, -(2**63), 1.5, None, "1", [], True)


def layout(chance: random.Random) -> tuple[dict, bytes]:
    """Header and tensors of a file that could be a LoRA."""
    header, data = {}, b""
    for module in chance.sample(MODULES, chance.randint(1, 3)):
        shapes = dict(chance.choice(WHOLE))
        if chance.random() < 0.3:
            some = chance.sample(PARTS, 3)
            shapes |= {
                part: [chance.choice((0, 1, 2, 5)) for _ in range(chance.randint(0, 5))]
                for part in some
            }
        for part, shape in shapes.items():
            kind = chance.choice(("F32", "F16") if chance.random() < 0.95 else tuple(SIZES))
            count = 1
            for side in shape:
                count *= side
            usual = chance.random() < 0.9
            value = 0.5 if usual else chance.choice((0.0, math.nan, math.inf, 1e30))
            numbers = struct.pack(f"<{count}f", *[value] * count)
            numbers = (numbers * 2)[: count * SIZES[kind]]
            header[module + part] = {
                "dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(numbers)]
            }  # fmt: skip
            data += numbers
    if chance.random() < 0.5:
        header["__metadata__"] = metadata(chance)
    return header, data


def metadata(chance: random.Random):
    config = chance.choice((
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(a+)+$": 2}}', '{"lora_alpha": "x"}', "[]",
        "[" * 10_000, '{"unet.lora_alpha": 1e400}', "{", '{"lora_alpha": 2, "use_rslora": true}',
        '{"lora_alpha": 1, "alpha_pattern": {"conv1": {}}}', '{"alpha_pattern": 7}',
    ))  # fmt: skip
    if chance.random() < 0.8:
        return {PEFT_METADATA: config}
    return chance.choice(({"a": "b"}, {"a": 1}, [], "x", {}))


def hurt(header: dict, chance: random.Random) -> None:
    """Changes something in the header."""
    name = chance.choice(list(header))
    entry = header[name]
    if not isinstance(entry, dict) or not {"shape", "data_offsets"} <= entry.keys():
        header[name] = chance.choice(NUMBERS)
        return
    way = chance.randrange(6)
    if way == 0:
        entry["shape"] = [chance.choice(NUMBERS) for _ in range(chance.randint(0, 4))]
    elif way == 1:
        entry["data_offsets"][chance.randrange(2)] = chance.choice(NUMBERS)
    elif way == 2:
        entry["dtype"] = chance.choice((*SIZES, "F128", "", None, 3))
    elif way == 3:
        del entry[chance.choice(list(entry))]
    elif way == 4:
        entries = [value for value in header.values() if isinstance(value, dict)]
        other = chance.choice(entries)
        entry["data_offsets"] = other.get("data_offsets", [0, 0])
    else:
        header[name] = chance.choice((None, [], {"": 1}, {"shape": {}}, 5))


def made(chance: random.Random) -> bytes:
    header, data = layout(chance)
    for _ in range(chance.choice((0, 0, 1, 2))):
        hurt(header, chance)
    text = json.dumps(header).encode()
    way = chance.randrange(12)
    if way == 0:  # duplicate keys
        text = text[:-1] + b"," + text[1:]
    elif way == 1:
        text = text.replace(b"{", b'{"x":' + b"[" * 10_000, 1)
    length = len(text)
    if way == 2:
        length = chance.choice((0, 1, length - 1, length + 1, 10**11, 2**63, 2**64 - 1))
    file = bytearray(struct.pack("<Q", length) + text + data)
    if way == 3:
        del file[chance.randrange(len(file)) :]
    elif way == 4:
        for _ in range(chance.randint(1, 8)):
            file[chance.randrange(len(file))] = chance.randrange(256)
    elif way == 5:
        file += bytes(chance.randrange(64))
    return bytes(file)


def work(vector) -> None:
    """What is read is whole: it can be added up, and decomposed where its numbers are numbers; and
    merged into a weight of its shape."""
    describe(vector)
    for module in vector.opaque.values():
        parts = dict(module)
        alpha = float(parts.pop("alpha")) if "alpha" in parts else None
        weight = torch.ones(module.shape if len(module.shape) > 1 else (*module.shape, 5))
        if not misfit(module, weight.shape):
            assert merged(parts, alpha, weight).shape == weight.shape
    if vector.opaque or not vector.deltas:
        return
    combined, _ = exact([vector], [1.0])
    factors = [f for d in combined.deltas.values() for f in (d.up, d.down)]
    if all(factor.isfinite().all() and factor.abs().max() < 1e9 for factor in factors):
        assert math.isfinite(truncated(combined, 1)[1].energy)


def fuzz(count: int, folder) -> dict[str, int]:
    """Reads this many files and uses the vectors; -> how many were read and refused."""
    path, counts = folder / "a.safetensors", {"read": 0, "refused": 0}

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def try_one(chance):
        path.write_bytes(made(chance))
        begun = time.process_time()
        try:
            work(read(path))
            counts["read"] += 1
        except ValueError as error:
            assert len(str(error)) > 20, error
            counts["refused"] += 1
        assert time.process_time() - begun < 1

    try_one()
    return counts


def test_broken_files_are_read_rightly_or_refused_with_a_sentence(tmp_path):
    fuzz(20, tmp_path)  # so that everything that is loaded at first use is loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = fuzz(1000, tmp_path)
    megabyte = 1024**2 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / megabyte
    assert grown < 64, f"{grown} MB for files of some kilobytes"
    assert counts["read"] > 30 and counts["refused"] > 100


@pytest.mark.faults
def test_many_broken_files(tmp_path):
    counts = fuzz(20_000, tmp_path)
    assert sum(counts.values()) >= 20_000
