"""The noise of a picture depends only on seed, batch index and step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lcm_lora.samplers.noise import picture_noise, picture_numbers, picture_seed
from lcm_lora.samplers.transfer import sent


@pytest.mark.parametrize("size", [(4, 8, 8), (4, 7, 9)])  # 252 values: not a multiple of 16
def test_a_picture_is_the_same_alone_and_in_a_batch(size):
    batch = picture_noise(torch.empty(7, *size), seed=5)
    for index in (0, 3, 6):
        alone = picture_noise(torch.empty(1, *size), seed=5, batch_index=[index])
        for step in (2, 0, 1):  # in any order
            assert torch.equal(batch(step)[index], alone(step)[0])


def test_everything_else_gives_other_noise():
    like = torch.empty(3, 4, 8, 8)
    pictures = [
        picture
        for seed in (0, 1, 2)
        for step in (0, 1, 2)
        for picture in picture_noise(like, seed)(step).unbind()
    ]
    correlation = torch.corrcoef(torch.stack(pictures).flatten(1)) - torch.eye(27)
    assert correlation.abs().max() < 0.3  # 256 values: one standard deviation is 0.06


def test_seeds_do_not_run_into_each_other():
    near = {picture_seed(s, i, n) for s in range(20) for i in range(20) for n in range(20)}
    assert len(near) == 8000
    assert len({seed & 0xFFFFFFFF for seed in near}) > 7990  # the CPU generator uses 32 bits
    assert 0 <= picture_seed(0xFFFFFFFFFFFFFFFF, 3, 1) < 2**64


def test_standard_normal_in_the_latents_type():
    noise = picture_noise(torch.empty(4, 4, 64, 64, dtype=torch.float64), 1)(0)
    assert noise.dtype == torch.float64
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    first = picture_noise(torch.empty(1, 4, 8, 8), 9)(0)
    assert torch.equal(torch.randn(4), expected)
    assert torch.equal(first, picture_noise(torch.empty(1, 4, 8, 8), 9)(0))


def test_numbers_and_batch_must_agree():
    with pytest.raises(ValueError):
        picture_noise(torch.empty(3, 4, 8, 8), 0, batch_index=[0, 1])(0)


@pytest.mark.parametrize(
    "batch_index",
    [
        [3, 5], (3, 5), np.array([3, 5]), np.array([3, 5], np.uint8), torch.tensor([3, 5]),
        torch.tensor([3, 5], dtype=torch.int16), [np.int64(3), np.int32(5)],
        list(torch.tensor([3, 5])), {3: "a", 5: "b"}.keys(),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_pictures_of_any_kind_of_integers(batch_index):
    numbers = picture_numbers(batch_index, 2)
    assert numbers == [3, 5] and all(type(number) is int for number in numbers)


@pytest.mark.parametrize("batch_index", [None, [], np.array([], int), torch.tensor([], dtype=int)])
def test_pictures_without_numbers_are_counted(batch_index):
    assert picture_numbers(batch_index, 3) == [0, 1, 2]


def test_one_number_alone():
    assert picture_numbers(np.array(7), 1) == picture_numbers(torch.tensor(7), 1) == [7]


@pytest.mark.parametrize(
    ("batch_index", "says"),
    [
        ([0.5, 1.0], r"is \[0.5, 1.0\]; expected one integer"),
        (np.array([0.5, 1.0]), "expected one integer"),
        (["a", "b"], "expected one integer"),
        ([[3], [5]], "expected one integer"),
        ([-1, 0], "has -1; expected numbers of pictures, from 0 on"),
        ([3], "has 1 numbers for 2 pictures"),
        (torch.arange(3), "has 3 numbers for 2 pictures"),
    ],
)
def test_numbers_of_pictures_that_are_none(batch_index, says):
    with pytest.raises(ValueError, match=says):
        picture_numbers(batch_index, 2)


def test_unknown_device():
    with pytest.raises(ValueError, match="'tpu'"):
        picture_noise(torch.empty(1, 4, 8, 8), 0, device="tpu")


def test_a_device_that_cannot_draw_is_told():
    """The meta device has no generator, as DirectML has none."""
    like = torch.empty(1, 4, 8, 8, device="meta")
    with pytest.raises(ValueError, match="noise on the device meta. Set noise_device to cpu"):
        picture_noise(like, 0, device="gpu")
    assert picture_noise(like, 0)(0).is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_on_the_gpu(dtype):
    like = torch.empty(2, 4, 8, 8, dtype=dtype)
    assert torch.equal(picture_noise(like.cuda(), 5)(1).cpu(), picture_noise(like, 5)(1))
    assert not torch.equal(
        picture_noise(like.cuda(), 5, device="gpu")(1).cpu(), picture_noise(like, 5)(1)
    )


@pytest.mark.gpu
def test_what_is_sent_to_a_gpu_waits_for_nothing():
    here, there = torch.randn(1000), torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = sent(here, there)
        with pytest.raises(RuntimeError, match="synchroniz"):
            here.to(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(copy.cpu(), here) and sent(copy, there) is copy
