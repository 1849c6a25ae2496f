"""LoRA files on disk: bad ones are explained, good ones are written completely or not at all."""

from __future__ import annotations

import json
import pickle
import re

import psutil
import pytest
import torch
from lcm_lora.lora.architecture import architecture_of
from lcm_lora.lora.blocks import weighted
from lcm_lora.lora.delta import Delta, Vector
from lcm_lora.lora.formats.describe import public
from lcm_lora.lora.formats.filenames import inside, offered
from lcm_lora.lora.formats.files import DTYPES, balanced, fingerprint, read, write
from lcm_lora.lora.formats.module_names import native_to_diffusers
from safetensors.torch import load_file, save_file

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def vector(columns: int = 768, **changes) -> Vector:
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*s, generator=generator) for s in ((20, 4), (4, columns)))
    return Vector({NAME: Delta(up, down, alpha=2.0)}, **{"metadata": {"note": "kept"}} | changes)


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 0), ("fp16", 1e-3), ("bf16", 1e-2)])
def test_what_is_written_is_read_back(tmp_path, dtype, error):
    path = tmp_path / "sub" / "a.safetensors"
    write(path, vector(), dtype, overwrite=False)
    again, made = read(path), vector().deltas[NAME]
    assert again.metadata["note"] == "kept" and again.source == "a.safetensors"
    assert set(load_file(path)) == {
        f"{NAME}.{p}" for p in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    assert again.deltas[NAME].up.dtype == DTYPES[dtype] and again.deltas[NAME].alpha == 2.0
    difference = again.deltas[NAME].matrix() - made.matrix()
    assert difference.norm() <= error * made.matrix().norm()


def test_a_look_at_a_large_file_reads_little_of_it(tmp_path):
    factors = {"lora_up.weight": (100_000, 1000), "lora_down.weight": (1000, 768)}
    header, end = {}, 0
    for part, shape in factors.items():
        begin, end = end, end + 2 * shape[0] * shape[1]
        header[f"{NAME}.{part}"] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # 200 MB of zeros, which take no room on the disk
    process = psutil.Process()
    before = process.memory_info().rss
    looked = read(path, mapped=True)
    shown = public(looked, "a")
    assert process.memory_info().rss - before < 50_000_000
    assert shown == public(read(path), "a") and shown["facts"]["rank"] == "1000"


def test_a_file_in_use_can_be_overwritten(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, vector(), "fp32", overwrite=False)
    loaded, before = read(path), fingerprint(path)
    expected = loaded.deltas[NAME].matrix()
    write(path, vector(columns=1024), "fp32", overwrite=True)
    torch.testing.assert_close(loaded.deltas[NAME].matrix(), expected)
    assert fingerprint(path) != before and read(path).deltas[NAME].shape == (20, 1024)


def test_an_existing_file_is_kept_unless_overwrite_is_set(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, vector(), "fp16", overwrite=False)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a.safetensors exists already"):
        write(path, vector(columns=1024), "fp16", overwrite=False)
    assert path.read_bytes() == before


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="a.safetensors is a folder; choose another name"):
            write(tmp_path / "a.safetensors", vector(), "fp16", overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("old", [b"old", None])
def test_a_failing_write_leaves_everything_as_it_was(tmp_path, small_files, old):
    path = tmp_path / "a.safetensors"
    if old:
        path.write_bytes(old)
    with small_files(1000), pytest.raises(OSError, match="too large"):
        write(path, vector(), "fp16", overwrite=True)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == (
        [("a.safetensors", old)] if old else []
    )


def test_values_too_small_for_fp16_are_reported(tmp_path, caplog):
    small = Vector({NAME: Delta(torch.full((20, 4), 1e-20), torch.ones(4, 768))})
    write(tmp_path / "a.safetensors", small, "fp16", False)
    assert "lora_up.weight is so small that fp16 keeps it with an error of 100 %" in caplog.text
    write(tmp_path / "b.safetensors", small, "bf16", False)
    assert read(tmp_path / "b.safetensors").deltas[NAME].up.any()


def test_values_too_large_for_fp16_are_refused(tmp_path):
    up = torch.full((20, 4), 1e12)
    up[0] = torch.inf  # this must not hide the finite ones
    big = Vector({NAME: Delta(up, torch.ones(4, 768))})
    with pytest.raises(ValueError, match="too large for fp16; save as bf16 or fp32"):
        write(tmp_path / "a.safetensors", big, "fp16", overwrite=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_a_small_factor_keeps_its_precision_in_fp16(tmp_path, size):
    """In a sum, each term's alpha and weight are multiplied into its up factor."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*s, generator=generator) for s in ((20, 4), (4, 768)))
    original = Delta(up * size * torch.tensor([1, 1e-3, 1, 1e3]), down)
    assert torch.equal(balanced(original).matrix(), original.matrix())
    write(tmp_path / "a.safetensors", Vector({NAME: original}), "fp16", False)
    read_back = read(tmp_path / "a.safetensors").deltas[NAME]
    for rank in range(4):  # one at a time, because the largest would hide the others
        made = read_back.up[:, rank, None].float() @ read_back.down[None, rank].float()
        expected = original.up[:, rank, None] @ original.down[None, rank]
        assert (made - expected).norm() <= 5e-4 * expected.norm()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_8_bits_are_written_and_weighted(tmp_path, kind):
    factors = vector().deltas[NAME]
    tensors = {f"{NAME}.lora_up.weight": factors.up, f"{NAME}.lora_down.weight": factors.down}
    tensors |= {f"{NAME}.diff_b": torch.ones(20)}
    save_file({key: t.to(kind) for key, t in tensors.items()}, tmp_path / "a.safetensors")
    original = read(tmp_path / "a.safetensors")
    half = weighted(original, lambda _: 0.5, "half")
    write(tmp_path / "b.safetensors", half, "fp16", False)
    read_back = read(tmp_path / "b.safetensors")
    torch.testing.assert_close(
        read_back.deltas[NAME].matrix(), original.deltas[NAME].matrix() / 2, rtol=1e-3, atol=1e-3
    )
    assert (read_back.diffs[f"{NAME}.diff_b"] == 0.5).all()


def test_products_and_cores_are_written_as_two_factors(tmp_path):
    """Other programs cannot read LoHa, LoKr or Tucker cores in a file of kohya's kind."""
    conv = NAME.replace("attentions_0_transformer_blocks_0_attn2_to_k", "resnets_0_conv1")
    proj = "lora_unet_down_blocks_0_attentions_0_proj_in"  # a convolution in SD1
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"{NAME}.lokr_w1": (2, 4), f"{NAME}.lokr_w2": (10, 192),
        f"{conv}.lora_up.weight": (8, 2, 1, 1), f"{conv}.lora_down.weight": (2, 6, 1, 1),
        f"{conv}.lora_mid.weight": (2, 2, 3, 3),
        f"{proj}.lokr_w1": (2, 2), f"{proj}.lokr_w2": (3, 3),
    }  # fmt: skip
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    original = read(tmp_path / "a.safetensors")
    write(tmp_path / "b.safetensors", original, "fp32", False)
    written = load_file(tmp_path / "b.safetensors")
    parts = {"lora_up.weight", "lora_down.weight", "alpha"}
    assert written.keys() == {f"{name}.{part}" for name in (NAME, conv, proj) for part in parts}
    read_back = read(tmp_path / "b.safetensors")
    assert written[f"{proj}.lora_down.weight"].dim() == 4
    for name, delta in original.deltas.items():
        matrix = read_back.deltas[name].matrix()
        assert matrix.shape == ((6, 6, 1, 1) if name == proj else delta.shape)
        torch.testing.assert_close(matrix.reshape(delta.shape), delta.matrix())


def whole_file() -> bytes:
    from safetensors.torch import save

    delta = vector().deltas[NAME]
    return save({f"{NAME}.lora_up.weight": delta.up, f"{NAME}.lora_down.weight": delta.down})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (whole_file()[:-100], "is not a complete safetensors file"),
        (whole_file()[:5], "is not a complete safetensors file"),
        (b"<html>404 not found</html>", "is a web page"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "is a web page"),
        (b'{"error": "Invalid username or password."}', "is JSON text"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13\n",
            "is a Git LFS pointer",
        ),
        (b'{"data":{"message": "Not found"}}', "is JSON text"),  # with a brace at byte 8
        (b"\xef\xbb\xbf<!DOCTYPE html>", "is a web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes([123]) + bytes(15), "is a GGUF file"),
        (b"\x1f\x8b\x08\x00" + bytes(12), "is a gzip archive"),
        (b"\x3c" + bytes(7), "is not a complete safetensors file"),  # a length that looks like <
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (pickle.dumps({"a": 1}), "is a pickle"),
        (b"PK\x03\x04 a torch zip", "is a pickle"),
    ],
)
def test_files_that_are_no_safetensors_are_explained(tmp_path, content, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.safetensors {words}"):
        read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": torch.tensor(float("nan"))}, "its alpha is nan"),
        ({"alpha": torch.ones(3)}, "its alpha has 3 values"),
        ({"lora_up.weight": torch.ones(20, 0), "lora_down.weight": torch.ones(0, 6)}, "rank is 0"),
        ({"lora_down.weight": torch.ones(5, 6)}, "do not multiply"),
    ],
)
def test_broken_modules_are_named(tmp_path, change, words):
    parts = {"lora_up.weight": torch.ones(20, 4), "lora_down.weight": torch.ones(4, 6)} | change
    save_file({f"{NAME}.{part}": t for part, t in parts.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors, module {NAME}: .*{words}"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("style", "style.safetensors"),
        ("lcm v1.5", "lcm v1.5.safetensors"),
        ("a/b.safetensors", "a/b.safetensors"),
        ("a\\b", "a/b.safetensors"),
        ("console", "console.safetensors"),
        ("잉크", "잉크.safetensors"),
    ],
)
def test_names_go_into_the_folder(tmp_path, name, expected):
    assert inside(tmp_path, name) == tmp_path / expected


@pytest.mark.parametrize(
    "name",
    ["", " ", "../a", "a/../../b", "a\\..\\b", "/etc/a", "\\a", "C:\\a", "c:a", "a\0b", "a\nb", "."]
    + ["con", "NUL.safetensors", "a/com1", "a/", "a//b", "a.", "a /b", "what?", "x" * 300]
    + ["COM\u00b9", "lpt\u00b2", "Com\u00b3.safetensors", "CONIN$", "conout$.x", "nul .x"]
    + [".safetensors", "a/.safetensors", " .safetensors ", "half \ud83d of a character"],
)
def test_names_that_leave_the_folder_or_fail_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="file name"):
        inside(tmp_path, name)


def test_only_safetensors_are_offered():
    assert offered(["a.safetensors", "b.ckpt", "c.SFT", "d.pt"]) == ["a.safetensors", "c.SFT"]


@pytest.mark.parametrize(
    ("width", "depth", "name"),
    [
        (768, 1, "SD1.5"),
        (1024, 1, "SD2"),
        (2048, 10, "SDXL"),
        (2048, 7, "SDXL"),
        (2048, 6, "SDXL type"),
        (2048, 4, "SDXL type"),
        (640, 1, None),
    ],
)
def test_the_architecture_follows_from_width_and_depth(width, depth, name):
    block = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_{}_attn2_to_k"
    delta = vector(columns=width).deltas[NAME]
    architecture = architecture_of({block.format(i): delta.shape for i in range(depth)})
    assert (architecture and architecture.name) == name


# transformer_depth, _middle and _output, as ComfyUI's model_detection.py has them.
TYPES = {
    "SDXL": ([0, 0, 2, 2, 10, 10], 10, [0, 0, 0, 2, 2, 2, 10, 10, 10]),
    "SSD-1B": ([0, 0, 2, 2, 4, 4], -1, [0, 0, 0, 1, 1, 2, 10, 4, 4]),
    "Segmind Vega": ([0, 0, 1, 1, 2, 2], -1, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
    "KOALA-700M": ([0, 2, 5], -2, [0, 0, 2, 2, 5, 5]),
    "KOALA-1B": ([0, 2, 6], 6, [0, 0, 2, 2, 6, 6]),
}


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """All cross-attention keys of a UNet of the SDXL type."""
    down, middle, up = TYPES[name]
    per_level = len(down) // 3
    depths = {f"input_blocks_{1 + i + i // per_level}_1": depth for i, depth in enumerate(down)}
    depths |= {"middle_block_1": middle}
    depths |= {f"output_blocks_{i}_1": depth for i, depth in enumerate(reversed(up))}
    inner = "transformer_blocks_{}_attn2_to_k"
    return {
        native_to_diffusers(f"lora_unet_{block}_{inner.format(i)}", per_level): (640, 2048)
        for block, depth in depths.items() for i in range(depth)
    }  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_a_relative_of_sdxl_is_recognised_by_all_its_attentions(name):
    shapes = shapes_of(name)
    assert architecture_of(shapes).name == name
    part = {module: shape for module, shape in shapes.items() if "_up_blocks_" not in module}
    assert architecture_of(part).name == ("SDXL" if name == "SDXL" else "SDXL type")


def test_an_sdxl_lora_of_few_blocks_is_not_said_to_be_of_a_relative(tmp_path):
    deep = re.compile(r".*_transformer_blocks_[4-9]_.*")
    made = {m: Delta(torch.ones(2, 1), torch.ones(1, 2048)) for m in shapes_of("SDXL")}
    weighted_down = Vector({m: delta for m, delta in made.items() if not deep.match(m)})
    assert architecture_of(weighted_down.shapes).name == "SDXL"
    write(tmp_path / "a.safetensors", weighted_down, "fp16", overwrite=False)
    metadata = read(tmp_path / "a.safetensors").metadata
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert "modelspec.usage_hint" not in metadata
    relative = Vector({m: made[m] for m in shapes_of("SSD-1B")})
    write(tmp_path / "b.safetensors", relative, "fp16", overwrite=False)
    metadata = read(tmp_path / "b.safetensors").metadata
    assert metadata["modelspec.usage_hint"] == "Made for SSD-1B."


def test_the_same_vector_is_the_same_file(tmp_path):
    """The library's own order of the metadata changes from one process to the next."""
    metadata = {f"key {i}": "x" * i for i in range(20)}
    backwards = dict(reversed(metadata.items()))
    for name, ordered in (("a", metadata), ("b", backwards)):
        write(tmp_path / f"{name}.safetensors", vector(metadata=ordered), "fp16", overwrite=False)
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert one == two
    header = one[8 : 8 + int.from_bytes(one[:8], "little")]
    assert header.index(b'"key 0"') < header.index(b'"key 1"') < header.index(b'"key 19"')
    assert len(header) % 8 == 0
    assert metadata.items() <= read(tmp_path / "a.safetensors").metadata.items()


@pytest.mark.parametrize(
    ("width", "version", "architecture"),
    [
        (768, "sd_v1", "stable-diffusion-v1/lora"),
        (1024, "sd_v2", "stable-diffusion-v2-512/lora"),
        (2048, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_other_tools_read_what_the_file_is(tmp_path, width, version, architecture):
    stale = {"ss_network_dim": "64", "ss_base_model_version": "sd_v9", "note": "kept"}
    stale["sshs_model_hash"] = "of other tensors"
    write(tmp_path / "a.safetensors", vector(width, metadata=stale), "fp16", overwrite=False)
    metadata = read(tmp_path / "a.safetensors").metadata
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "2"
    assert metadata["ss_base_model_version"] == version and metadata["note"] == "kept"
    assert metadata["modelspec.architecture"] == architecture
    assert "sshs_model_hash" not in metadata
    finer = {"ss_base_model_version": f"{version}_v", "modelspec.architecture": "stable-diffusion"}
    write(tmp_path / "a.safetensors", vector(width, metadata=finer), "fp16", overwrite=True)
    metadata = read(tmp_path / "a.safetensors").metadata
    assert metadata["ss_base_model_version"] == f"{version}_v"
    assert metadata["modelspec.architecture"] == architecture


def test_ranks_that_differ_are_called_as_kohya_does(tmp_path):
    two = Vector({NAME: vector().deltas[NAME], "other": Delta(torch.ones(3, 2), torch.ones(2, 3))})
    write(tmp_path / "a.safetensors", two, "fp16", overwrite=False)
    assert read(tmp_path / "a.safetensors").metadata["ss_network_dim"] == "Dynamic"


@pytest.mark.parametrize("low", range(0, 256, 8))
def test_a_header_of_any_length_is_no_pickle(tmp_path, low):
    """Pickles begin with 0x80, and so does every 32nd length of a header."""
    path, note = tmp_path / "a.safetensors", ""
    write(path, vector(metadata={"note": note}), "fp16", overwrite=False)
    while (length := path.read_bytes()[0]) != low:
        note += "x" * ((low - length) % 256)
        write(path, vector(metadata={"note": note}), "fp16", overwrite=True)
    assert read(path).metadata["note"] == note
