"""Checkpoints are complete or ignored."""

import pytest
import torch
from lcm_lora.training import disk
from lcm_lora.training.state import checkpoints
from lcm_lora.training.state.checkpoints import Checkpoint, newest, prune, read, save


def made(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "a": torch.randn(4, 3, generator=generator),
        "b": torch.randn(2, generator=generator),
    }
    return Checkpoint(
        step, tensors, {"0.exp_avg": tensors["a"] * 2}, {"best": 0.1 + 0.2, "best_step": None}
    )


def same(one, two):
    assert one.step == two.step and one.state == two.state
    for mine, other in ((one.adapter, two.adapter), (one.optimiser, two.optimiser)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_the_newest_comes_back_exactly(tmp_path):
    assert newest(tmp_path) is None
    for step in (10, 100, 20):
        save(tmp_path, made(step))
    (tmp_path / "step-of-mine").mkdir()  # as many characters as a step's
    assert checkpoints.steps(tmp_path) == [10, 20, 100]
    same(newest(tmp_path), made(100))
    same(read(tmp_path, 20), made(20))
    with pytest.raises(FileNotFoundError, match="no checkpoint step-00000021"):
        read(tmp_path, 21)


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no manifest"])
def test_a_torn_one_is_passed_over(tmp_path, caplog, harm):
    save(tmp_path, made(1))
    last = save(tmp_path, made(2))
    file = last / "adapter.safetensors"
    data = file.read_bytes()
    if harm == "cut":
        file.write_bytes(data[:-7])
    elif harm == "changed":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "gone":
        file.unlink()
    else:
        (last / checkpoints.MANIFEST).unlink()
    with pytest.raises(ValueError, match="step 2 is damaged: "):
        read(tmp_path, 2)
    same(newest(tmp_path), made(1))
    assert "step-00000002 is skipped" in caplog.text
    same_again = made(2)
    save(tmp_path, same_again)
    same(newest(tmp_path), same_again)


def test_an_interrupted_one_leaves_the_last(tmp_path):
    save(tmp_path, made(1))
    with pytest.raises(KeyError), disk.whole_folder(tmp_path / "step-00000002") as new:
        (new / "adapter.safetensors").write_bytes(b"half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path, made(step))
    prune(tmp_path, 2, best=3)
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["3", "5", "6"]


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path, small_files):
    save(tmp_path, made(1))
    big = Checkpoint(2, {"a": torch.zeros(1 << 20)}, {}, {})
    with small_files(1 << 20), pytest.raises(OSError, match="could not be written"):
        save(tmp_path, big)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    same(newest(tmp_path), made(1))


def test_a_whole_one_of_the_same_step_stays_on_the_disk(tmp_path):
    path = save(tmp_path, made(3))
    before = path.stat()
    assert save(tmp_path, made(3)) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
