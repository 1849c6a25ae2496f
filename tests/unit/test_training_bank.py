"""The latent bank: built once, resumable, complete or not used."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import psutil
import pytest
import torch
from lcm_lora.training.data import bank
from lcm_lora.training.ranks import Ranks
from lcm_lora.training.tensors import save

SIZES = (64, 64, 0, 0, 64, 64)


class Numbers:
    """A source whose latents are the example's number; `bad` numbers cannot be read."""

    def __init__(self, count, bad=(), shapes=((4, 2, 2),), captions=("a", "b", "c")):
        self.count, self.bad, self.shapes, self.of = count, set(bad), shapes, captions
        self.made = []

    def __len__(self):
        return self.count

    def captions(self):
        return [self.of[i % len(self.of)] for i in range(self.count)]

    def rows(self, numbers, text, between):
        self.made += numbers
        results = []
        for number in numbers:
            assert text(number)["context"][0, 0] == ord(self.captions()[number][0])
            latent = torch.full(self.shapes[number % len(self.shapes)], float(number))
            row = bank.Row(latent, (number, *SIZES[1:]))
            bad = bank.Unreadable(f"{number}.png is cut off")
            results.append(bad if number in self.bad else row)
        return results


def encode(caption):
    return {"context": torch.full((77, 3), float(ord(caption[0]))), "pooled": torch.ones(5)}


def build(folder, source, encode=encode, limit=0.1, processes=None, reports=None):
    reports = reports if reports is not None else []
    bank.build(folder, source, encode, limit, processes or Ranks(), lambda *a: reports.append(a))
    return bank.Bank(folder)


def test_rows_come_back_with_their_captions_and_sizes(tmp_path):
    built = build(tmp_path, Numbers(150))
    assert len(built) == 150
    latents, texts, sizes = built.batch([0, 149, 77])
    assert latents[:, 0, 0, 0].tolist() == [0, 149, 77]
    assert texts["context"].shape == (3, 77, 3) and texts["pooled"].shape == (3, 5)
    assert texts["context"][:, 0, 0].tolist() == [ord("abc"[i % 3]) for i in (0, 149, 77)]
    assert sizes[:, 0].tolist() == [0, 149, 77]


def test_each_caption_is_encoded_once(tmp_path):
    seen = []
    build(tmp_path, Numbers(130), lambda caption: seen.append(caption) or encode(caption))
    assert seen == ["a", "b", "c"]


def test_a_finished_bank_is_not_built_again(tmp_path):
    build(tmp_path, Numbers(10))
    source = Numbers(10)
    build(tmp_path, source)
    assert source.made == []


class Died(Exception):
    pass


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path):
    class Dies(Numbers):
        def rows(self, numbers, text, between):
            if numbers[0] >= 128:
                raise Died
            return super().rows(numbers, text, between)

    with pytest.raises(Died):
        build(tmp_path, Dies(300))
    with pytest.raises(ValueError, match="no complete latent bank"):
        bank.Bank(tmp_path)
    source = Numbers(300)
    built = build(tmp_path, source)
    assert source.made == list(range(128, 300))
    assert built.batch(range(300))[0][:, 0, 0, 0].tolist() == list(range(300))


def test_what_is_raised_between_two_calls_ends_the_build_and_tears_nothing(tmp_path):
    class Draws(Numbers):
        def rows(self, numbers, text, between):
            between()
            return super().rows(numbers, text, between)

    def building(calls):
        left = iter(range(calls))

        def between():
            if next(left, None) is None:
                raise Died

        with pytest.raises(Died):
            bank.build(
                tmp_path, Draws(300), encode, 0.1, Ranks(), lambda *a: reports.append(a),
                between=between,
            )  # fmt: skip
        return sorted(file.name for file in tmp_path.iterdir())

    reports = []
    assert building(2) == []  # at the third text
    assert building(3) == ["texts-00000.safetensors"]  # before the first row
    assert reports[-1] == ("rows", 0, 300)
    assert building(1) == ["rows-00000.safetensors", "texts-00000.safetensors"]
    assert len(build(tmp_path, Draws(300))) == 300


def test_the_half_file_of_a_job_that_builds_the_same_bank_stays(tmp_path):
    pid = os.getppid()  # another process, which is alive
    theirs, dead = tmp_path / f".tmp-{pid}-a", tmp_path / ".tmp-999999999-b"
    for file in (theirs, dead):
        file.write_bytes(b"half")
    build(tmp_path, Numbers(3))
    assert theirs.exists() and not dead.exists()


def test_two_processes_build_every_other_file(tmp_path):
    barrier = Barrier(2)

    class Threads(Ranks):
        def wait(self):
            barrier.wait(timeout=30)

    sources = [Numbers(300), Numbers(300)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(build, tmp_path, sources[r], processes=Threads(r, 2)) for r in (0, 1)]
        banks = [job.result() for job in jobs]
    first, second = (set(source.made) for source in sources)
    assert not first & second and first | second == set(range(300))
    assert len(banks[0]) == len(banks[1]) == 300


def test_unreadable_examples_are_left_out_and_named(tmp_path, caplog):
    built = build(tmp_path, Numbers(100, bad=[3, 70]))
    assert len(built) == 98
    assert built.batch([2, 3])[0][:, 0, 0, 0].tolist() == [2, 4]
    assert built.skipped == ["3.png is cut off", "70.png is cut off"]
    assert "3.png is cut off" in caplog.text and "70.png is cut off" in caplog.text


def test_too_many_unreadable_examples_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="20 of 100 examples cannot be used.*0.png is cut off"):
        build(tmp_path, Numbers(100, bad=range(20)))


def test_latents_that_are_not_finite_are_an_error(tmp_path):
    class Broken(Numbers):
        def rows(self, numbers, text, between):
            return [bank.Row(torch.full((4, 2, 2), torch.nan), SIZES) for _ in numbers]

    with pytest.raises(ValueError, match="not finite.*--fp32-vae"):
        build(tmp_path, Broken(3))


@pytest.mark.parametrize(
    ("value", "words"), [(1e5, "reaches 1e.05 of 65504"), (torch.inf, "is not finite")]
)
def test_what_half_precision_does_not_hold_is_an_error(tmp_path, value, words):
    def large(caption):
        return {"context": torch.full((77, 3), value if caption == "b" else 1.0)}

    class Large(Numbers):
        def rows(self, numbers, text, between):
            return [bank.Row(torch.full((4, 2, 2), value), SIZES) for _ in numbers]

    with pytest.raises(ValueError, match=f"output for 'b' .*{words}.*--fp32-text-enc"):
        build(tmp_path, Numbers(3), large)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"latent of example 0 .*{words}.*--fp32-vae"):
        build(tmp_path, Large(3))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process lists its maps so")
def test_a_large_bank_keeps_few_files_open(tmp_path, monkeypatch):
    """There are 20 files of rows and 5 of texts; 4 of each may be open."""
    monkeypatch.setattr(bank, "OPEN", 4)
    captions = [chr(33 + i % 90) + str(i) for i in range(320)]
    built = build(tmp_path, Numbers(320, captions=captions))
    for row in range(0, 320, 16):
        latents, _, sizes = built.batch([row])
        assert latents[0, 0, 0, 0] == row and sizes[0, 0] == row
    maps = psutil.Process().memory_maps(grouped=False)
    held = {path.path for path in maps if str(tmp_path) in path.path}
    assert 0 < len(held) <= 8


def test_a_damaged_file_is_noticed(tmp_path):
    build(tmp_path, Numbers(10))
    file = tmp_path / "rows-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged or missing"):
        bank.Bank(tmp_path)


def test_the_key_follows_from_checkpoint_and_settings():
    assert bank.key("a", {"x": 1, "y": 2}) == bank.key("a", {"y": 2, "x": 1})
    assert len({bank.key("a", {"x": 1}), bank.key("b", {"x": 1}), bank.key("a", {"x": 2})}) == 3


def test_shorter_texts_are_repeated_and_attention_does_not_notice():
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randn(n, 8, generator=generator) for n in (77, 154))
    both = bank.together([{"context": short}, {"context": long}])["context"]
    assert both.shape == (2, 154, 8)
    query = torch.randn(1, 5, 8, generator=generator)
    attend = torch.nn.functional.scaled_dot_product_attention
    alone = attend(query, short[None], short[None])
    assert torch.allclose(attend(query, both[:1], both[:1]), alone, atol=1e-6)


def test_texts_of_flow_models_come_back_as_they_were(tmp_path):
    """Of different lengths, with whole numbers, and with features beyond half precision."""
    texts = {
        "a": {"cross_attn": torch.full((1, 2, 3), 1e5), "t5xxl_ids": torch.tensor([31999, 7])},
        "b": {"cross_attn": torch.ones(1, 5, 3), "t5xxl_ids": torch.tensor([1, 2, 30001])},
    }
    tensors, _ = bank._texts(range(2), list(texts), list(texts.values()))
    save(tmp_path / "texts-00000.safetensors", tensors)
    read = bank.Texts(tmp_path)
    parts = bank.apart(bank.together([read[0], read[1]]))
    for part, text in zip(parts, texts.values(), strict=True):
        assert part.keys() == text.keys()
        assert all(torch.equal(part[name], text[name]) for name in text)


def test_its_size_is_foreseen_for_captions_of_any_length(tmp_path):
    """Language models give features for each token: a caption has as many as it is long."""

    def of_tokens(caption):
        features = torch.full((1, 1 + len(caption), 16), float(ord(caption[:1] or "a")))
        return {bank.FEATURES: features, "context": features[0]}

    source = Numbers(64, captions=("a", "b" * 500, "c" * 40))
    folder = tmp_path / "bank"
    bank.build(folder, source, of_tokens, 0.1, Ranks(), lambda *_: None)
    texts = folder / "texts-00000.safetensors"
    foreseen = bank.size(source, torch.Size((4, 2, 2)), of_tokens)
    latents = 2 * 64 * 16
    assert foreseen == latents + 2 * 2 * 16 * (3 + 541)
    assert 0 <= texts.stat().st_size - (foreseen - latents) < 1000  # the header
