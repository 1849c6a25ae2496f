"""Few-step LoRA Stack: its rows do what the host's own loader does with them one after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lcm_lora.tests.host.test_loader import family_of, shown_lines
from lcm_lora.tests.host.test_vectors import text_clip, text_lora
from lcm_lora.tests.host.tiny_lora import dialects, modules, patched_weights, tiny_model
from safetensors.torch import load_file, save_file

FAST = "rows-lcm-lora.safetensors"
ROWS = (  # name, dialect, weight, weight on the text encoder
    ("rows/one.safetensors", "kohya", 0.7, 0.4),
    ("rows/two.safetensors", "native", -0.3, 1.1),
)


@pytest.fixture(scope="module")
def model(comfy):
    return tiny_model()


@pytest.fixture(scope="module")
def loras(comfy, model) -> Path:
    """The folder, with an acceleration and two styles, each of its own rank, alpha and dialect."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("loras")[0])
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    fast = dialects(model, rank=5)["kohya"]
    for key in fast:
        if key.endswith(".alpha"):
            fast[key] = torch.tensor(2.0)  # the file's own: 2 / 5
    save_file(fast, folder / FAST)
    for seed, (name, dialect, *_) in enumerate(ROWS, 1):
        save_file(dialects(model, 2 + seed, seed)[dialect] | text_lora(), folder / name)
    return folder


def count_of(*rows, **changes) -> dict:
    """The node's rows: (name, weight, text weight) each."""
    values = {"count": str(len(rows))}
    for number, (name, weight, text) in enumerate(rows, 1):
        values |= {f"on_{number}": True, f"lora_{number}": name}
        values |= {f"weight_{number}": weight, f"text_weight_{number}": text}
    return values | changes


BOTH = count_of(*((name, weight, text) for name, _, weight, text in ROWS))


def run(model, count, clip=None, strength=0.9, family="auto", name=FAST):
    from lcm_lora.nodes.rows import LCMLoRAStack

    return LCMLoRAStack.execute(model, name, strength, family, count, clip)


def weights_of(target) -> dict[str, torch.Tensor]:
    return patched_weights(target if hasattr(target, "patches") else target.patcher)


def assert_alike(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-5, atol=1e-6)


def test_it_does_what_the_hosts_loader_does_one_after_the_other(model, loras):
    import comfy.sd
    from lcm_lora.nodes.vectors import LCMLoRAApply

    clip = text_clip()
    files = [(FAST, "", 0.9, 0.9), *ROWS]
    theirs = model, clip
    for name, _, weight, text in files:
        theirs = comfy.sd.load_lora_for_models(*theirs, load_file(loras / name), weight, text)
    output = run(model, BOTH, clip)
    patched, patched_clip, vector, info = output.result
    assert not model.patches and not clip.patcher.patches
    summed = LCMLoRAApply.execute(model, vector, 1.0, 1.0, clip).result
    for ours in ((patched, patched_clip), summed):
        for pair in zip(ours, theirs, strict=True):
            assert_alike(*map(weights_of, pair))
    count = len(modules(model))
    assert shown_lines(output) == [
        "lcm; LoRAs applied: 3",
        f"0.9 x rows-lcm-lora: {count} of {count} modules",
        f"0.7 / 0.4 x one: {count + 1} of {count + 1} modules",
        f"-0.3 / 1.1 x two: {count + 1} of {count + 1} modules",
        "from the name rows-lcm-lora.safetensors",
    ]
    assert "  rank: 5\n  alpha / rank: 0.4\n  family: lcm\n" in info and "Sum: " in info


def test_it_is_the_sum_of_products_in_float64(model, loras):
    weights, before = weights_of(run(model, BOTH).result[0]), model.model.state_dict()
    path, native = next(iter(modules(model).items()))
    expected = before[f"diffusion_model.{native}.weight"].double()
    names = {"kohya": f"lora_unet_{path.replace('.', '_')}", "native": f"diffusion_model.{native}"}
    for name, dialect, weight in ((FAST, "kohya", 0.9), *(row[:3] for row in ROWS)):
        tensors, key = load_file(loras / name), names[dialect]
        up, down = (tensors[f"{key}.lora_{part}.weight"].double() for part in ("up", "down"))
        scale = float(tensors[f"{key}.alpha"]) / down.shape[0]
        delta = up.flatten(1) @ down.flatten(1) * scale * weight
        expected = expected + delta.reshape(expected.shape)
    actual = weights[f"diffusion_model.{native}.weight"].double()
    assert (actual - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize(
    ("changes", "applied"),
    [
        ({"on_1": False}, ["two"]),
        ({"lora_2": "None"}, ["one"]),
        ({"weight_1": 0.0, "text_weight_1": 0.0}, ["two"]),
        ({"count": "1"}, ["one"]),
        ({"on_1": False, "on_2": False}, []),
    ],
)
def test_what_is_off_or_empty_is_left_out(model, loras, changes, applied):
    output = run(model, BOTH | changes)
    named = [line.split(" x ")[1].split(":")[0] for line in shown_lines(output) if " x " in line]
    assert named == ["rows-lcm-lora", *applied]
    assert output.result[1] is None
    assert all(("rows/" + name in output.result[3]) == (name in applied) for name in ("one", "two"))


def test_a_missing_file_of_a_row_that_is_off_does_no_harm(model, loras):
    from lcm_lora.nodes.rows import LCMLoRAStack

    gone = BOTH | {"lora_1": "gone.safetensors"}
    with pytest.raises(FileNotFoundError, match="gone"):
        run(model, gone)
    gone |= {"on_1": False}
    run(model, gone)
    prints = LCMLoRAStack.fingerprint_inputs(model=None, lora_name=FAST, count=gone)
    assert [Path(path).name for path, *_ in prints] == [FAST, "two.safetensors"]


@pytest.mark.parametrize("connected", ["on_1", "weight_1"])
def test_a_new_file_of_a_row_with_a_connected_input_is_noticed(model, loras, connected):
    from lcm_lora.nodes.rows import LCMLoRAStack

    count = BOTH | {"text_weight_1": 0.0, connected: None}  # as the host passes it
    prints = LCMLoRAStack.fingerprint_inputs(model=None, lora_name=FAST, count=count)
    assert [Path(path).name for path, *_ in prints] == [FAST, "one.safetensors", "two.safetensors"]


def test_the_sum_is_sampled_as_its_acceleration(model, loras):
    from lcm_lora.lora.family import FAMILY
    from lcm_lora.samplers.host import applied_to

    patched, _, vector, info = run(model, BOTH, family="tcd").result
    assert family_of(patched) == "tcd" and vector.metadata[FAMILY] == "tcd"
    assert [known.families for known in applied_to(patched).accelerations] == [("tcd",)]
    # Without a name that tells, it is what the node samples.
    (loras / FAST).with_name("plain.safetensors").write_bytes((loras / FAST).read_bytes())
    output = run(model, count_of(("None", 1, 1)), name="plain.safetensors")
    assert family_of(output.result[0]) == "lcm" and output.result[2].metadata[FAMILY] == "lcm"
    assert shown_lines(output)[-1].startswith("the default")
    # At 0 it is left out of the weights, and of the sum.
    patched, _, vector, _ = run(model, BOTH, strength=0.0).result
    assert not applied_to(patched).accelerations and FAMILY not in vector.metadata
    assert family_of(patched) == "lcm"


def test_a_file_that_fits_nothing_is_named(model, loras):
    save_file(
        {"lora_unet_nowhere.lora_up.weight": torch.ones(4, 2),
         "lora_unet_nowhere.lora_down.weight": torch.ones(2, 4)},
        loras / "stranger.safetensors",
    )  # fmt: skip
    with pytest.raises(ValueError, match="takes none of the 1 modules of stranger.safetensors"):
        run(model, BOTH | {"lora_2": "stranger.safetensors"})
    wide = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{wide}.lora_up.weight": torch.ones(320, 2),
         f"{wide}.lora_down.weight": torch.ones(2, 2048)},
        loras / "large.safetensors",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"large.safetensors was made for SDXL.*model is SD1.5"):
        run(model, BOTH | {"lora_1": "large.safetensors"})


def test_a_dora_is_applied_in_its_place_and_the_sum_says_that_there_is_none(model, loras):
    from comfy_execution.graph_utils import ExecutionBlocker
    from lcm_lora.nodes.vectors import LCMLoRAApply, LCMLoRAVectorLoader

    tensors = dialects(model, 3, 9)["kohya"]
    for key in [key for key in tensors if key.endswith("to_q.lora_up.weight")]:
        name = key.removesuffix(".lora_up.weight")
        tensors[f"{name}.dora_scale"] = torch.full((tensors[key].shape[0], 1), 0.8)
    save_file(tensors, loras / "dora.safetensors")
    patched, _, vector, info = run(model, BOTH | {"lora_2": "dora.safetensors"}).result
    expected = model
    for name, weight in ((FAST, 0.9), (ROWS[0][0], 0.7), ("dora.safetensors", -0.3)):
        (wire, _) = LCMLoRAVectorLoader.execute(name).result
        expected = LCMLoRAApply.execute(expected, wire, weight, 0.0).result[0]
    assert_alike(weights_of(patched), weights_of(expected))
    assert isinstance(vector, ExecutionBlocker)
    assert vector.message.startswith("The LoRAs have no sum. dora.safetensors holds DoRA")
    assert "kind: DoRA" in info and "No sum: dora.safetensors" in info
