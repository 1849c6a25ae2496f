"""What goes to a Ray cluster's storage, without a cluster."""

import pytest
from lcm_lora.training import disk
from lcm_lora.training.cluster.follower import Follower
from lcm_lora.training.cluster.settings import Cluster
from lcm_lora.training.data.captioned import find
from lcm_lora.training.spec import Spec
from lcm_lora.training.state.journal import Journal


@pytest.fixture
def follower(tmp_path):
    for name in ("job", "storage"):
        (tmp_path / name).mkdir()
    cluster = Cluster("http://head:8265", str(tmp_path / "storage"), "/host")
    spec = Spec("/host", "/checkpoint", "/o.safetensors", "/banks")
    return Follower(tmp_path / "job", spec, cluster, Journal(tmp_path / "job"))


def test_linked_folders_are_copied_as_they_are_read_and_again_when_they_change(follower, tmp_path):
    pictures, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for folder, name in ((pictures, "a"), (elsewhere, "b")):
        folder.mkdir()
        (folder / f"{name}.png").write_bytes(b"picture")
        (folder / f"{name}.txt").write_text(name)
    (pictures / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(pictures)
    (pictures / "gone.png").symlink_to(tmp_path / "none")
    here = [(picture.name, picture.caption) for picture in find(pictures)]
    copied = disk.files_under(tmp_path / "storage")[0]
    assert here == [("a.png", "a"), ("more/b.png", "b")] and not copied
    there = follower._brought(str(pictures))
    assert [(picture.name, picture.caption) for picture in find(type(tmp_path)(there))] == here
    assert follower._brought(str(pictures)) == there
    (elsewhere / "b.txt").write_text("another caption")
    assert follower._brought(str(pictures)) != there


def test_a_file_and_an_empty_folder_are_copied(follower, tmp_path):
    file, empty = tmp_path / "a.safetensors", tmp_path / "embeddings"
    file.write_bytes(b"weights")
    empty.mkdir()
    assert type(tmp_path)(follower._brought(str(file))).read_bytes() == b"weights"
    assert type(tmp_path)(follower._brought(str(empty))).is_dir()
