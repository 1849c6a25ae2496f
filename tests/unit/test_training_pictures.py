"""Pictures with captions become examples, the same ones whenever they are asked for."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from lcm_lora.training.bank import Unreadable
from lcm_lora.training.captioned import find
from lcm_lora.training.pictures import Pictures, buckets
from lcm_lora.training.sources import source
from lcm_lora.training.spec import Data, Spec
from PIL import Image


def gradient(width, height, mode="RGB"):
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    return image.convert(mode)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three pictures of different shapes, captions beside them, one in a subfolder."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for name, size in (("a", (200, 100)), ("b", (100, 100)), ("more/c", (90, 160))):
        (root / f"{name}.png").write_bytes(encoded(gradient(*size)))
        (root / f"{name}.txt").write_text(f"ein Bär, {name}\n", encoding="utf-8")
    return root


def shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (1024, 64), (64, 8), (64, 64)])
def test_buckets_have_the_area_and_whole_multiples(resolution, multiple):
    found = buckets(resolution, multiple)
    assert found[0] == (resolution, resolution)
    assert len(set(found)) == len(found)
    for height, width in found:
        assert height % multiple == width % multiple == 0
        assert height * width <= resolution**2
        assert 0.5 <= height / width <= 2
        assert (width + multiple) * height > resolution**2
    assert {(w, h) for h, w in found} == set(found)


def test_each_picture_goes_to_the_bucket_of_its_shape(folder):
    pictures = Pictures(folder, 512)
    shapes = [tuple(pictures.example(i).pixels.shape) for i in range(3)]
    assert shapes[1] == (512, 512, 3)
    assert shapes[0][1] / shapes[0][0] == pytest.approx(2, rel=0.2)
    assert shapes[2][0] / shapes[2][1] == pytest.approx(16 / 9, rel=0.15)
    assert pictures.captions() == ["ein Bär, a", "ein Bär, b", "ein Bär, more/c"]


def test_the_crop_lies_within_and_its_sizes_are_told(folder):
    pictures = Pictures(folder, 64, crops=8, flip=False, multiple=64)
    assert len(pictures) == 24
    places = set()
    for number in range(8):
        example = pictures.example(number)
        height, width, top, left, *target = example.sizes
        assert (height, width, target) == (100, 200, [64, 64])
        assert top == 0 and 0 <= left <= 64
        # The picture is 128 wide now, so red says where the crop began.
        begins = float(example.pixels[:, 0, 0].mean()) * 127
        assert begins == pytest.approx(left, abs=2)
        places.add(left)
    assert len(places) > 4


def test_one_crop_is_the_middle(folder):
    assert Pictures(folder, 64, flip=False).example(0).sizes[2:4] == (0, 32)


def test_half_of_the_examples_are_mirrored(folder):
    pictures = Pictures(folder, 64, crops=60, flip=True)
    rising = [
        bool((p := pictures.example(60 + i).pixels)[0, -1, 0] > p[0, 0, 0]) for i in range(60)
    ]
    assert 15 < sum(rising) < 45


def test_a_mirrored_crop_counts_from_the_mirrored_edge(folder):
    pictures = Pictures(folder, 64, crops=16)
    seen = set()
    for number in range(16):
        example = pictures.example(number)
        red = example.pixels[:, :, 0].mean(0) * 127
        mirrored = bool(red[0] > red[-1])
        begins = 127 - float(red[0]) if mirrored else float(red[0])
        assert begins == pytest.approx(example.sizes[3], abs=2)
        seen.add(mirrored)
    assert seen == {True, False}


def test_a_long_strip_is_cut_without_being_blown_up(folder):
    (folder / "b.png").write_bytes(encoded(Image.new("RGB", (20000, 2), "white")))
    example = Pictures(folder, 1024).example(1)  # 4 million x 768 when it covers its bucket
    assert example.pixels.shape == (768, 1344, 3) and (example.pixels == 1).all()


def test_an_example_is_the_same_whatever_was_read_before(folder):
    forwards, backwards = Pictures(folder, 64, crops=4), Pictures(folder, 64, crops=4)
    first = [forwards.example(i) for i in range(12)]
    second = [backwards.example(i) for i in reversed(range(12))][::-1]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, second, strict=True))
    assert not torch.equal(Pictures(folder, 64, 4, seed=1).example(0).pixels, first[0].pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_rgb(folder, mode):
    if mode == "I;16":
        grey = np.linspace(0, 65535, 100 * 100).reshape(100, 100).astype(np.uint16)
        data = encoded(Image.fromarray(grey))
    else:
        data = encoded(gradient(100, 100, mode), "TIFF" if mode == "CMYK" else "PNG")
    (folder / "b.png").write_bytes(data)
    pixels = Pictures(folder, 64, flip=False).example(1).pixels
    assert pixels.shape == (64, 64, 3) and pixels.dtype == torch.float32
    assert pixels.min() < 0.1 and pixels.max() > 0.7


def test_what_is_transparent_becomes_white(folder):
    (folder / "b.png").write_bytes(encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 0))))
    assert (Pictures(folder, 64).example(1).pixels == 1).all()


def test_a_photo_is_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    (folder / "b.jpg").write_bytes(encoded(gradient(200, 100), "JPEG", exif=exif, quality=95))
    (folder / "b.png").unlink()
    example = Pictures(folder, 64, flip=False).example(1)
    assert example.sizes[:2] == (200, 100)
    assert example.pixels[0, :, 0].std() < example.pixels[:, 0, 0].std()


@pytest.mark.parametrize("harm", ["cut", "text", "bomb"])
def test_a_broken_picture_is_named(folder, harm, monkeypatch):
    file = folder / "b.png"
    if harm == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    else:
        file.write_bytes(file.read_bytes()[:60] if harm == "cut" else b"no picture")
    with pytest.raises(Unreadable, match="b.png: "):
        Pictures(folder, 64).example(1)


def test_metadata_jsonl_gives_the_captions(folder):
    for text in folder.rglob("*.txt"):
        text.unlink()
    lines = [{"file_name": f"{name}.png", "text": name.upper()} for name in ("a", "b", "more/c")]
    file = folder / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [each.caption for each in find(folder)] == ["A", "B", "MORE/C"]
    file.write_text('{"file_name": "a.png"}')
    with pytest.raises(ValueError, match="Line 1 of metadata.jsonl"):
        find(folder)
    file.write_text('{"file_name": "../x.png", "text": "x"}')
    with pytest.raises(ValueError, match="leaves its folder"):
        find(folder)
    for broken in ('{"file_name": 5, "text": "x"}', '{"file_name": "a.png", "text": null}'):
        file.write_text(broken)
        with pytest.raises(ValueError, match="Line 1 of metadata.jsonl is not of the form"):
            find(folder)
    file.write_text('{"file_name": "z.png", "text": "x"}')
    with pytest.raises(ValueError, match="'z.png', which is not there"):
        find(folder)


def test_pictures_that_are_links_and_odd_line_ends_are_taken(folder, tmp_path):
    links = tmp_path / "snapshot"
    links.mkdir()
    (links / "a.png").symlink_to(folder / "a.png")
    line = json.dumps({"file_name": "a.png", "text": "one\u2028two"}, ensure_ascii=False)
    (links / "metadata.jsonl").write_text(line, encoding="utf-8")
    assert [each.caption for each in find(links)] == ["one\u2028two"]


def test_an_empty_picture_in_a_shard_does_not_read_its_neighbours(tmp_path):
    picture = encoded(gradient(64, 64))
    tar = shard(tmp_path / "s.tar", {"a.txt": b"a", "a.png": b"", "b.txt": b"b", "b.png": picture})
    assert [each.read() for each in find(tar)] == [b"", picture]
    with pytest.raises(Unreadable, match="a.png: this is no picture"):
        Pictures(tar, 64).example(0)


def test_a_shard_gives_what_a_folder_gives(folder, tmp_path):
    samples = {}
    for each in find(folder):
        key = each.name.removesuffix(".png").replace("/", "-")
        samples |= {f"{key}.png": each.read(), f"{key}.json": b""}
        samples[f"{key}.json"] = json.dumps({"caption": each.caption}).encode()
    tar = shard(tmp_path / "shard-000.tar", samples)
    one, two = Pictures(folder, 64, crops=2), Pictures(tar, 64, crops=2)
    assert one.captions() == two.captions()
    for number in range(len(one)):
        assert torch.equal(one.example(number).pixels, two.example(number).pixels)
    tar.rename(tmp_path / "SHARD.TAR")
    (folder / "._a.png").write_bytes(b"what macOS puts beside a file")
    names = [each.name for each in find(tmp_path)]
    assert names[:3] == ["SHARD.TAR/a.png", "SHARD.TAR/b.png", "SHARD.TAR/more-c.png"]
    assert names[3:] == ["pictures/a.png", "pictures/b.png", "pictures/more/c.png"]


def test_what_is_missing_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="no folder and no tar"):
        find(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no picture in"):
        find(empty)
    (empty / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="compressed tar"):
        find(empty)
    with pytest.raises(ValueError, match="compressed tar"):
        find(empty / "x.tar.gz")
    with pytest.raises(ValueError, match="no picture in"):
        find(shard(tmp_path / "texts.tar", {"a.txt": b"a"}))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="bad.tar is no whole tar"):
        find(tmp_path / "bad.tar")
    (folder / "a.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text"):
        find(folder)
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match="1 of 3 pictures have no caption: a.png"):
        find(folder)


def test_the_settings_change_with_the_files(folder):
    before = Pictures(folder, 64).settings()
    assert Pictures(folder, 64).settings() == before
    assert json.loads(json.dumps(before)) == before
    (folder / "b.txt").write_text("something else", encoding="utf-8")
    assert Pictures(folder, 64).settings() != before


def test_before_each_picture_and_each_encoding_one_may_end(folder):
    class Encoder:
        def encode(self, pixels):
            done.append(f"encoded {len(pixels)}")
            return torch.zeros(len(pixels), 4, 8, 8)

    done = []
    data = Data(kind="pictures", path=str(folder))
    spec = Spec("/host", "/checkpoint", "/o.safetensors", "/banks", data=data, resolution=64)
    rows = source(spec, Encoder()).rows([0, 1, 2], None, lambda: done.append("asked"))
    assert len(rows) == 3
    assert done == ["asked"] * 3 + ["asked", "encoded 1"] * 3  # three shapes
