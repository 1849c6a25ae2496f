"""A flow model from the files of its parts: diffusion model, text encoder, VAE."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lcm_lora.tests.host import sd3_file
from lcm_lora.training.data.bank import together
from lcm_lora.training.jobs.order import Order, TeacherOrder
from lcm_lora.training.schema import build
from lcm_lora.training.spec import Data
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PREFIXES = {
    "diffusion_models": "model.diffusion_model.",
    "text_encoders": "text_encoders.clip_l.transformer.", "vae": "first_stage_model.",
}  # fmt: skip
PROMPTS = ("a red fox", "a cup of tea")


@pytest.fixture(scope="module")
def parts(comfy, tmp_path_factory):
    """The checkpoint and its parts, by ComfyUI's folders of models, where they lie too."""
    import folder_paths

    whole = sd3_file.write(tmp_path_factory.mktemp("parts") / "whole.safetensors")
    state, paths = load_file(whole), {"checkpoint": whole}
    for kind, prefix in PREFIXES.items():
        path = Path(folder_paths.get_folder_paths(kind)[0]) / f"part-{kind}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k.removeprefix(prefix): x for k, x in state.items() if prefix in k}, path)
        paths[kind] = path
    folder_paths.filename_list_cache.clear()
    yield paths
    for kind in PREFIXES:
        paths[kind].unlink()
    folder_paths.filename_list_cache.clear()


@pytest.fixture(autouse=True)
def _training_flag(comfy, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", False)


def loaded(parts, **changes):
    from lcm_lora.training.host import load_teacher

    files = parts | changes
    return load_teacher(
        files["diffusion_models"], text_encoders=(files["text_encoders"],), vae_file=files["vae"]
    )


def test_the_parts_are_the_checkpoint(parts):
    from lcm_lora.training.host import load_teacher

    z, t = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1)), [839, 385]
    pixels, answers = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2)), []
    for teacher in (load_teacher(parts["checkpoint"]), loaded(parts)):
        texts = together([teacher.text(prompt) for prompt in PROMPTS])
        with torch.no_grad():
            cond, _ = teacher.conditions(texts, torch.zeros(2, 6))
            answers.append([teacher(z, torch.tensor(t), **cond), teacher.encode(pixels)])
    assert all(x.isfinite().all() for answer in answers for x in answer)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@pytest.mark.parametrize(
    ("kind", "instead", "words"),
    [
        ("vae", "small", "small.safetensors is the VAE of another model: .* 4 channels.* 2 and 16"),
        ("vae", "diffusion_models", "part-diffusion_models.safetensors is not a VAE"),
        ("text_encoders", "vae", "not the text encoders of SD3|is not a text encoder"),
        ("diffusion_models", "vae", "part-vae.safetensors is not a diffusion model"),
        ("vae", "gone", "There is no file .*gone"),
    ],
)
def test_a_part_of_another_model_is_named(parts, tmp_path, kind, instead, words):
    from comfy.taesd.taesd import TAESD

    small = tmp_path / "small.safetensors"
    save_file({k: x.half() for k, x in TAESD(latent_channels=4).state_dict().items()}, small)
    others = parts | {"small": small, "gone": tmp_path / "gone"}
    with pytest.raises(ValueError, match=words):
        loaded(parts, **{kind: others[instead]})


def test_a_part_that_is_missing_is_named(comfy):
    with pytest.raises(ValueError, match="Distillation Teacher lacks a text encoder and a VAE"):
        TeacherOrder(diffusion_model="x.safetensors")
    from lcm_lora.training.spec import Spec

    with pytest.raises(ValueError, match="text_encoders and vae belong together"):
        Spec(host="/", checkpoint="/c", output="/o.safetensors", banks="/b", vae="/v")


def test_the_node_orders_a_job_that_makes_a_lora(parts, job, tmp_path):
    from lcm_lora.nodes.distill import LCMTeacher
    from lcm_lora.training.jobs import host

    names = {kind: parts[kind].name for kind in PREFIXES}
    teacher = LCMTeacher.execute(
        diffusion_model=names["diffusion_models"], text_encoder=names["text_encoders"],
        text_encoder_2="none", text_encoder_3="none", vae=names["vae"],
    ).result[0]  # fmt: skip
    order = build(
        Order, {"checkpoint": "none", "data": {}, "name": "of-parts", "teacher": teacher}, "x"
    )
    ordered = host._spec(order, tmp_path / "banks")
    files = ordered.checkpoint, *ordered.text_encoders, ordered.vae
    assert files == tuple(str(parts[kind]) for kind in PREFIXES)
    spec = job(
        "parts", checkpoint=files[0], text_encoders=files[1:2], vae=files[2], steps=1, rank=2,
        batch=1, checkpoint_every=1, host_flags=("--cpu",),
        data=Data(prompts=PROMPTS, count=1, draw_steps=1),
    )  # fmt: skip
    file = tmp_path / "spec.json"
    file.write_text(spec.to_json(), encoding="utf-8")
    command = [sys.executable, str(ROOT / "training" / "run.py"), str(file)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert Path(spec.output).exists()


def test_a_job_from_a_checkpoint_keeps_its_hash(job):
    assert '"vae"' not in job("a").to_json() and '"text_encoders"' not in job("a").to_json()
