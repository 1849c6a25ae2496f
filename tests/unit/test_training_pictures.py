"""Pictures with captions become examples, the same ones every time."""

import csv
import io
import json
import os
import struct
import sys
import tarfile
import unicodedata
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from lcm_lora.training.data.bank import Unreadable
from lcm_lora.training.data.captioned import find, picture_suffixes, summary
from lcm_lora.training.data.pictures import Pictures, buckets
from lcm_lora.training.data.sources import read_prompts, source
from lcm_lora.training.spec import Data, Spec
from PIL import Image
from PIL.PngImagePlugin import PngInfo


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
    """Three pictures of different shapes with caption files, one in a subfolder."""
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
    sizes = buckets(resolution, multiple)
    assert sizes[0] == (resolution, resolution)
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert height * width <= resolution**2
        assert 0.5 <= height / width <= 2
        assert (width + multiple) * height > resolution**2
    assert {(w, h) for h, w in sizes} == set(sizes)


def test_each_picture_goes_to_the_bucket_of_its_shape(folder):
    pictures = Pictures(folder, 512)
    shapes = [tuple(pictures.example(i).pixels.shape) for i in range(3)]
    assert shapes[1] == (512, 512, 3)
    assert shapes[0][1] / shapes[0][0] == pytest.approx(2, rel=0.2)
    assert shapes[2][0] / shapes[2][1] == pytest.approx(16 / 9, rel=0.15)
    assert pictures.captions() == ["ein Bär, a", "ein Bär, b", "ein Bär, more/c"]


def test_the_crop_lies_within_and_its_sizes_are_recorded(folder):
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
    assert [picture.caption for picture in find(folder)] == ["A", "B", "MORE/C"]
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
    with pytest.raises(ValueError, match="'z.png', which does not exist"):
        find(folder)


def test_pictures_that_are_links_and_odd_line_ends_are_taken(folder, tmp_path):
    links = tmp_path / "snapshot"
    links.mkdir()
    (links / "a.png").symlink_to(folder / "a.png")
    line = json.dumps({"file_name": "a.png", "text": "one\u2028two"}, ensure_ascii=False)
    (links / "metadata.jsonl").write_text(line, encoding="utf-8")
    assert [picture.caption for picture in find(links)] == ["one\u2028two"]


def test_an_empty_picture_in_a_shard_does_not_read_its_neighbours(tmp_path):
    picture = encoded(gradient(64, 64))
    tar = shard(tmp_path / "s.tar", {"a.txt": b"a", "a.png": b"", "b.txt": b"b", "b.png": picture})
    assert [entry.read() for entry in find(tar)] == [b"", picture]
    with pytest.raises(Unreadable, match="a.png: Pillow cannot read this"):
        Pictures(tar, 64).example(0)


def test_a_shard_gives_what_a_folder_gives(folder, tmp_path):
    samples = {}
    for picture in find(folder):
        key = picture.name.removesuffix(".png").replace("/", "-")
        samples |= {f"{key}.png": picture.read(), f"{key}.json": b""}
        samples[f"{key}.json"] = json.dumps({"caption": picture.caption}).encode()
    tar = shard(tmp_path / "shard-000.tar", samples)
    one, two = Pictures(folder, 64, crops=2), Pictures(tar, 64, crops=2)
    assert one.captions() == two.captions()
    for number in range(len(one)):
        assert torch.equal(one.example(number).pixels, two.example(number).pixels)
    tar.rename(tmp_path / "SHARD.TAR")
    (folder / "._a.png").write_bytes(b"what macOS puts beside a file")
    names = [picture.name for picture in find(tmp_path)]
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
    with pytest.raises(ValueError, match="bad.tar is not a complete tar"):
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


@pytest.mark.parametrize("suffix", [".gif", ".tiff", ".TIF", ".ppm", ".tga", ".ico", ".jfif"])
def test_every_format_of_pillow_is_read(tmp_path, suffix):
    with open(tmp_path / f"a{suffix}", "wb") as file:
        gradient(64, 64).save(file, Image.registered_extensions()[suffix.lower()])
    (tmp_path / "a.txt").write_text("a gradient")
    pixels = Pictures(tmp_path, 64, flip=False).example(0).pixels
    expected = torch.from_numpy(np.asarray(gradient(64, 64), np.float32) / 255)
    assert (pixels - expected).abs().mean() < 0.1  # a GIF has 256 colours, a JPEG is lossy


def test_frames_that_are_not_used_are_named(tmp_path, caplog):
    for name, more in (("film", [gradient(64, 64, "L")]), ("still", [])):
        with open(tmp_path / f"{name}.gif", "wb") as file:
            gradient(64, 64).save(file, "GIF", save_all=True, append_images=more)
        (tmp_path / f"{name}.txt").write_text(name)
    pictures = Pictures(tmp_path, 64, flip=False)
    assert all(pictures.example(number).pixels.shape == (64, 64, 3) for number in range(2))
    assert caplog.messages == ["only the first frame of film.gif is used"]


def test_no_ending_is_taken_that_pillow_knows_by_name_only():
    assert {".gif", ".tif", ".psd"} <= set(picture_suffixes())
    assert not {".h5", ".grib", ".mpg", ".pdf", ".txt", ".tar", ".json"} & set(picture_suffixes())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.caption", "x"), ("a.TXT", "x"), ("a.Caption", "x"), ("a.json", '{"caption": "x"}'),
        ("metadata.csv", "file_name,text\na.png,x\n"),
        ("METADATA.CSV", "\ufefffile_name, caption\r\na.png, x\r\n"),
        ("metadata.csv", 'id,caption,file_name\n1,"x",a.png\n'),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "", "caption": "x"}'),
    ],
)  # fmt: skip
def test_a_caption_is_taken_wherever_tools_put_it(tmp_path, name, text):
    (tmp_path / "a.png").write_bytes(encoded(gradient(8, 8)))
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    pictures = find(tmp_path)
    assert [picture.caption for picture in pictures] == ["x"] and not pictures.unused


def test_the_next_caption_is_taken_where_the_first_is_empty(tmp_path):
    picture = encoded(gradient(8, 8))
    files = {"a.png": picture, "a.txt": b" \n", "a.caption": b"x", "a.json": b"no JSON at all"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert [picture.caption for picture in find(tmp_path)] == ["x"]
    shard(tmp_path / "s.tar", files)
    assert [picture.caption for picture in find(tmp_path / "s.tar")] == ["x"]


def test_a_csv_is_read_as_python_writes_it(tmp_path):
    captions = ['a "quoted", one', "two\nlines", "ein Bär"]
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for number, caption in enumerate(captions):
            (tmp_path / f"{number}.png").write_bytes(encoded(gradient(8, 8)))
            table.writerow([f"{number}.png", caption])
    assert [picture.caption for picture in find(tmp_path)] == captions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name;text\na.png;x\n", "Line 2 of metadata.csv is not of the form file_name,text"),
        ("file_name,text\na.png\n", "Line 2 of metadata.csv is not of the form"),
        ('file_name,text\na.png,"x\n', "Line 2 of metadata.csv is not of the form"),
        ("file_name,text\n../a.png,x\n", "leaves its folder"),
        ("file_name,text\nb.png,x\n", "'b.png', which does not exist"),
    ],
)
def test_a_broken_csv_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "a.png").write_bytes(encoded(gradient(8, 8)))
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        find(tmp_path)


def test_a_picture_that_a_table_names_is_taken_whatever_its_ending(tmp_path):
    (tmp_path / "0001").write_bytes(encoded(gradient(64, 64)))
    (tmp_path / "metadata.csv").write_text("file_name,text\n0001,x\n")
    assert Pictures(tmp_path, 64).example(0).caption == "x"


def test_a_table_made_on_windows_names_its_pictures(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.png").write_bytes(encoded(gradient(8, 8)))
    table = tmp_path / "metadata.jsonl"
    table.write_text(json.dumps({"file_name": "some\\a.png", "text": "x"}))
    assert [(one.name, one.caption) for one in find(tmp_path)] == [("some/a.png", "x")]
    table.write_text(json.dumps({"file_name": "..\\a.png", "text": "x"}))
    with pytest.raises(ValueError, match="leaves its folder"):
        find(tmp_path)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_a_name_is_found_in_both_of_its_spellings(tmp_path, on_disk, listed):
    """macOS unpacks é as two characters, and a table or a caption may have it as one."""
    other = {"NFC": "NFD", "NFD": "NFC"}[on_disk]
    picture, text = (unicodedata.normalize(form, "é") for form in (on_disk, other))
    (tmp_path / f"{picture}.png").write_bytes(encoded(gradient(8, 8)))
    if listed:
        row = {"file_name": f"{text}.png", "text": "x"}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    else:
        (tmp_path / f"{text}.txt").write_text("x")
    pictures = find(tmp_path)
    assert [one.caption for one in pictures] == ["x"] and not pictures.unused


HALF = "\\ud800"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"metadata.jsonl": f'\n{{"file_name": "a.png", "text": "{HALF}"}}'.encode()},
            "Line 2 of metadata.jsonl contains .*ud800",
        ),
        ({"a.json": f'{{"caption": "{HALF} x"}}'.encode()}, "a.json contains .*ud800"),
        ({"a.txt": b"fine\nBr\xfcnn"}, "a.txt is not UTF-8 text .line 2"),
        ({"metadata.csv": b"file_name,text\na.png,x\nb.png,\xff"}, "metadata.csv .*line 3"),
    ],
)
def test_a_caption_that_is_no_unicode_is_refused_with_its_line(tmp_path, files, message):
    picture = encoded(gradient(8, 8))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a.png").write_bytes(picture)
    with pytest.raises(ValueError, match=message):
        find(tmp_path)
    if "a.json" in files:
        tar = shard(tmp_path / "s.tar", {**files, "a.png": picture})
        with pytest.raises(ValueError, match=f"s.tar/{message}"):
            find(tar)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "iCCP", "after"])
def test_a_png_with_long_texts_beside_its_pixels_is_read(tmp_path, kind):
    """Such as a workflow. Pillow refuses more than 1 MB compressed, or 64 MB in all."""
    image, info, options = gradient(64, 64), PngInfo(), {}
    if kind == "tEXt":
        for number in range(7):
            info.add_text(f"part {number}", "x" * 10_000_000)
    elif kind == "iCCP":
        options["icc_profile"] = bytes(2_000_000)
    elif kind == "after":
        info.add(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_000_000)), after_idat=True)
    else:
        add = info.add_itxt if kind == "iTXt" else info.add_text
        add("workflow", "x" * 2_000_000, zip=True)
    data = encoded(image, pnginfo=info, **options)
    with pytest.raises(ValueError, match=r"too large|Too much"):
        Image.open(io.BytesIO(data)).load()
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "a.txt").write_text("x")
    found = Pictures(tmp_path, 64, flip=False).example(0).pixels
    assert torch.equal(found, torch.from_numpy(np.asarray(image, np.float32) / 255))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_unicode_can_be_written_and_its_picture_is_used(tmp_path):
    for stem in (b"caf\xe9", b"caf\xe8"):
        for suffix, data in ((b".png", encoded(gradient(64, 64))), (b".txt", b"a cafe")):
            with open(os.fsencode(tmp_path) + b"/" + stem + suffix, "wb") as file:
                file.write(data)
    pictures = Pictures(tmp_path, 64)
    assert [picture.name for picture in pictures.data] == ["caf\\xe8.png", "caf\\xe9.png"]
    assert pictures.example(1).pixels.shape == (64, 64, 3)
    tar = shard(tmp_path / "s.tar", {"b\udce9.png": encoded(gradient(8, 8)), "b\udce9.txt": b"x"})
    assert [picture.name for picture in find(tar)] == ["s.tar/b\\xe9.png"]


def test_linked_folders_are_followed_once(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    for name in ("x", "deep/y"):
        (elsewhere / f"{name}.png").write_bytes(encoded(gradient(64, 64)))
        (elsewhere / f"{name}.txt").write_text(name)
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "deep" / "back").symlink_to(folder)
    (folder / "again").symlink_to(folder / "more")
    (folder / "nowhere.png").symlink_to(tmp_path / "none")
    pictures = find(folder)
    assert [picture.name for picture in pictures] == [
        "a.png", "b.png", "linked/deep/y.png", "linked/x.png", "more/c.png",
    ]  # fmt: skip
    unused = sorted(name for name, _ in pictures.unused)
    assert unused == ["again", "linked/deep/back", "nowhere.png"]


def test_everything_that_is_not_used_is_named(folder):
    (folder / "second.txt").write_text("no picture has this name")
    (folder / "a.caption").write_text("the .txt is taken")
    for name in ("film.mp4", "table.parquet", ".DS_Store"):
        (folder / name).write_bytes(b"")
    picture, lines = encoded(gradient(64, 64)), '{"file_name": "c.png", "text": "x"}\n' * 2
    (folder / "more" / "metadata.jsonl").write_text(lines)
    shard(folder / "s.tar", {
        "1.png": picture, "1.txt": b"x", "1.json": b"{}", "1.jpg": picture, "1.cls": b"3",
        "2.txt": b"y", "._1.png": b"", "v.2.png": picture,
    })  # fmt: skip
    pictures = find(folder)
    assert [picture.caption for picture in pictures] == ["x", "ein Bär, a", "ein Bär, b", "x"]
    names = [name for name, _ in pictures.unused]
    assert sorted(names) == sorted([
        "second.txt", "a.caption", "film.mp4", "table.parquet", ".DS_Store", "more/c.txt",
        "line 1 of more/metadata.jsonl", "s.tar/1.json", "s.tar/1.jpg", "s.tar/1.cls",
        "s.tar/2.txt", "s.tar/._1.png", "s.tar/v.2.png",
    ])  # fmt: skip
    sentence = summary(pictures.unused)
    assert "Not used (13)" in sentence and "and 3 more (neither" in sentence
    assert summary([]) == ""


def test_a_file_of_prompts_is_read_however_it_was_saved(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n# no prompt\r\n  # nor this\n\ta dog, #1 \ra cat")
    assert read_prompts(str(file)) == ["a cat", "a dog, #1", "a cat"]
    file.write_bytes(b"  # nothing else\n")
    with pytest.raises(ValueError, match="contains no prompt: expected one per line"):
        read_prompts(str(file))


def test_prompts_beyond_the_count_are_named():
    data = Data(prompts=("a", "b", "c"), count=2)
    spec = Spec("/host", "/checkpoint", "/o.safetensors", "/banks", data=data)
    assert [prompt for prompt, _ in source(spec, None).unused] == ["c"]
    long = Data(prompts=("a", *[f"{'a photo of a fox ' * 9}{i}" for i in range(236)]), count=1)
    sentence = summary(source(replace(spec, data=long), None).unused)
    assert sentence.startswith("Not used (236): a photo of a fox")
    assert sentence.endswith("… and 235 more (count is 1, so only that many prompts are used).")
    assert len(sentence) < 150


def png16(pixels, colour, clear=None):
    """A PNG of 16 bits, which Pillow does not write: [H, W, C] numbers; clear: its tRNS chunk."""
    return png(pixels.astype(">u2"), pixels.shape[1], 16, colour, clear)


def png(rows, width, bits, colour, clear=None):
    """A PNG of packed rows [H, ...]."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    data = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0))]
    parts += [(b"tRNS", np.array(clear, ">u2").tobytes())] if clear else []
    parts += [(b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("colour", "pixel", "clear"),
    [
        (0, [1000], [1000]),  # grey, where one grey is transparent
        (2, [1000, 2000, 60000], [1000, 2000, 60000]),  # RGB, where one colour is transparent
        (4, [1000, 0], None),  # grey and alpha
        (6, [1000, 2000, 60000, 0], None),
    ],
)
def test_what_is_transparent_in_16_bits_becomes_white_too(folder, colour, pixel, clear):
    solid = 65535 // 2
    pixels = np.full((64, 64, len(pixel)), solid, np.uint16)
    pixels[..., -1] = 65535 if colour in (4, 6) else solid
    pixels[:, :32] = pixel
    (folder / "b.png").write_bytes(png16(pixels, colour, clear))
    converted = Pictures(folder, 64, flip=False).example(1).pixels
    assert (converted[:, :31] == 1).all()
    assert (converted[:, 33:] - 0.5).abs().max() < 0.01


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_is_transparent_in_few_bits_becomes_white_too(folder, bits):
    """Greys 0 and maximum; 0 is transparent. Pillow scales them to 8 bits."""
    most = 2**bits - 1
    greys = np.full((64, 64, 1), most, np.uint8)
    greys[:, :32] = 0
    packed = np.packbits(np.unpackbits(greys, axis=2)[..., -bits:].reshape(64, -1), axis=1)
    (folder / "b.png").write_bytes(png(packed, 64, bits, 0, [0]))
    assert (Pictures(folder, 64, flip=False).example(1).pixels == 1).all()
    (folder / "b.png").write_bytes(png(packed, 64, bits, 0, [most]))
    pixels = Pictures(folder, 64, flip=False).example(1).pixels
    assert (pixels[:, :31] == 0).all()
    assert (pixels[:, 33:] == 1).all()


def test_a_disk_that_fails_is_no_broken_picture(folder, monkeypatch):
    def fails(_):
        raise OSError(5, "Input/output error")

    pictures = Pictures(folder, 64)
    (folder / "a.png").unlink()
    with pytest.raises(Unreadable, match="a.png: No such file"):
        pictures.example(0)
    monkeypatch.setattr(type(pictures.data[1]), "read", fails)
    with pytest.raises(OSError, match="Input/output error") as error:
        pictures.example(1)
    assert not isinstance(error.value, Unreadable)


def test_memory_that_runs_out_is_no_broken_picture(folder, monkeypatch):
    def full(_):
        raise MemoryError

    monkeypatch.setattr("lcm_lora.training.data.pictures.ImageOps.exif_transpose", full)
    with pytest.raises(MemoryError):
        Pictures(folder, 64).example(0)
