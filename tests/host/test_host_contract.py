"""What we use of the host beside its API of nodes: a test sees it change before users do.

A row names a function and the call of it that we make; see lora/host.py, samplers/host.py,
training/host.py, training/teacher.py, training/flow/, training/jobs/ and nodes/. Run it with each
host that is supported.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

X = object()  # any value: only the form of a call is held against the signature

CALLS = [
    # Loading a checkpoint, and its place in memory.
    (
        "comfy.sd.load_checkpoint_guess_config", (X,),
        ("embedding_directory", "model_options", "disable_dynamic"),
    ),
    ("comfy.options.enable_args_parsing", (), ()),
    ("comfy.model_management.get_torch_device", (), ()),
    ("comfy.model_management.get_free_memory", (X,), ()),
    ("comfy.model_management.load_models_gpu", (X,), ("force_full_load",)),
    ("comfy.model_management.free_memory", (X, X, X), ()),
    ("comfy.model_management.soft_empty_cache", (), ()),
    ("comfy.model_management.unload_all_models", (), ()),
    ("comfy.model_management.throw_exception_if_processing_interrupted", (), ()),
    ("comfy.sd.CLIP.tokenize", (X, X), ()),
    ("comfy.sd.CLIP.encode_from_tokens", (X, X), ("return_pooled",)),
    ("comfy.sd.VAE.encode", (X, X), ()),
    ("comfy.sd.VAE.decode", (X, X), ()),
    ("comfy.model_base.BaseModel.process_latent_in", (X, X), ()),
    ("comfy.model_base.BaseModel.process_latent_out", (X, X), ()),
    # LoRA on models.
    ("comfy.lora.load_lora", (X, X), ("log_missing",)),
    ("comfy.lora.model_lora_keys_unet", (X, X), ()),
    ("comfy.lora.model_lora_keys_clip", (X, X), ()),
    ("comfy.lora.calculate_weight", (X, X, X), ()),
    ("comfy.utils.unet_to_diffusers", (X,), ()),
    ("comfy.utils.ProgressBar", (X,), ()),
    ("comfy.utils.ProgressBar.update_absolute", (X, X, X), ()),
    ("comfy.model_patcher.ModelPatcher.clone", (X,), ()),
    ("comfy.model_patcher.ModelPatcher.add_patches", (X, X, X), ()),
    ("comfy.model_patcher.ModelPatcher.get_key_patches", (X, X), ()),
    ("comfy.model_patcher.ModelPatcher.get_model_object", (X, X), ()),
    ("comfy.model_patcher.ModelPatcher.add_object_patch", (X, X, X), ()),
    ("comfy.sd.CLIP.clone", (X,), ()),
    ("comfy.sd.CLIP.add_patches", (X, X, X), ()),
    # Sampling.
    ("comfy.model_sampling.ModelSamplingDiscrete", (X,), ("zsnr",)),
    ("comfy.model_sampling.ModelSamplingDiscrete.set_sigmas", (X, X), ()),
    ("comfy.model_sampling.EPS.calculate_denoised", (X, X, X, X), ()),
    ("comfy.model_sampling.reshape_sigma", (X, X), ()),
    ("comfy.model_sampling.rescale_zero_terminal_snr_sigmas", (X,), ()),
    ("comfy.samplers.KSAMPLER", (X, X), ()),
    ("comfy.samplers.KSAMPLER.max_denoise", (X, X, X), ()),
    ("comfy.sample.fix_empty_latent_channels", (X, X, X), ()),
    ("comfy.sample.prepare_noise", (X, X, X), ()),
    (
        "comfy.sample.sample_custom", (X,) * 8,
        ("noise_mask", "callback", "disable_pbar", "seed"),
    ),
    ("latent_preview.prepare_callback", (X, X), ()),
    # Folders and jobs.
    ("folder_paths.get_filename_list", (X,), ()),
    ("folder_paths.get_full_path", (X, X), ()),
    ("folder_paths.get_full_path_or_raise", (X, X), ()),
    ("folder_paths.get_folder_paths", (X,), ()),
    ("folder_paths.get_input_directory", (), ()),
    ("folder_paths.get_system_user_directory", (X,), ()),
    ("comfy_execution.utils.get_executing_context", (), ()),
]  # fmt: skip

ATTRIBUTES = [
    ("comfy.model_base.ModelType", "EPS", "V_PREDICTION"),
    ("comfy.model_base", "BaseModel", "SDXL"),
    ("comfy.model_sampling", "EPS", "V_PREDICTION", "X0", "IMG_TO_IMG", "EDM",
     "ModelSamplingDiscreteEDM", "StableCascadeSampling"),
    ("comfy.model_management", "current_loaded_models"),
    ("comfy.utils", "PROGRESS_BAR_ENABLED"),
    ("comfy.ldm.modules.diffusionmodules.openaimodel", "ResBlock"),
    ("comfy.ldm.modules.attention", "SpatialTransformer"),
]  # fmt: skip


def named(path):
    """The object of a dotted path: a module, or what is in one."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            target = getattr(target, part)
        return target
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize(("path", "arguments", "options"), CALLS, ids=[row[0] for row in CALLS])
def test_the_host_takes_our_call(comfy, path, arguments, options):
    inspect.signature(named(path)).bind(*arguments, **dict.fromkeys(options, X))


@pytest.mark.parametrize("row", ATTRIBUTES, ids=[row[0] for row in ATTRIBUTES])
def test_the_host_has_what_we_name(comfy, row):
    owner, *names = row
    assert [name for name in names if not hasattr(named(owner), name)] == []


def test_our_sampler_takes_what_the_host_gives(comfy):
    """FewStepSampler.sample is called with positions, as its parent's is."""
    import comfy.samplers
    from lcm_lora.samplers.host import FewStepSampler

    theirs, ours = (
        list(inspect.signature(kind.sample).parameters)
        for kind in (comfy.samplers.KSAMPLER, FewStepSampler)
    )
    assert ours == theirs


def test_every_flag_that_a_job_gets_is_one_of_the_hosts(comfy):
    from comfy.cli_args import parser
    from lcm_lora.training import host as trainer
    from lcm_lora.training.jobs import host

    ours = {*host.FLAGS, *host.VALUED_FLAGS, *trainer._NO_DEVICE, *trainer._NO_BACKWARD}
    ours |= trainer._ATTENTION
    assert ours - parser._option_string_actions.keys() == set()
    valued = {flag for flag in host.FLAGS if parser._option_string_actions[flag].nargs != 0}
    assert valued == set()


@pytest.fixture(scope="module")
def loaded(comfy, toy_checkpoint):
    """(model, clip, vae) as ComfyUI loads a checkpoint."""
    import comfy.sd

    return comfy.sd.load_checkpoint_guess_config(str(toy_checkpoint), disable_dynamic=True)[:3]


def test_a_loaded_checkpoint_has_what_we_read(loaded):
    import comfy.model_management as management

    patcher, clip, vae = loaded
    model, network = patcher.model, patcher.model.diffusion_model
    assert type(model).__name__ == "BaseModel"
    assert model.model_type.name == "EPS"
    assert network.num_classes is None
    config = model.model_config.unet_config
    assert {"in_channels", "num_res_blocks", "context_dim", "transformer_depth"} <= config.keys()
    assert vae.first_stage_model is not None
    assert clip.cond_stage_model.state_dict() and clip.patcher.load_device
    management.load_models_gpu([patcher], force_full_load=True)
    assert patcher in [entry.model for entry in management.current_loaded_models]
    management.free_memory(1e30, patcher.load_device, [])
    assert patcher not in [entry.model for entry in management.current_loaded_models]


def test_a_loaded_model_has_the_blocks_that_are_recomputed_and_compiled(loaded):
    from lcm_lora.training.memory import blocks_of

    kinds = {type(block).__name__ for block in blocks_of(loaded[0].model.diffusion_model)}
    assert kinds == {"ResBlock", "SpatialTransformer"}


def test_a_loaded_model_knows_how_it_would_be_loaded_again(loaded, toy_checkpoint):
    """The guard against models with a guidance embedding reads the file's name there."""
    assert hasattr(loaded[0], "cached_patcher_init")
    if made := loaded[0].cached_patcher_init:  # young hosts only
        assert made[1][0] == str(toy_checkpoint)


def test_a_weight_is_returned_with_its_patches(loaded):
    key = "diffusion_model.out.2.weight"
    model = loaded[0].clone()
    assert model.add_patches({key: ("diff", (torch.ones(1),))}, 0.5) == [key]
    (weight, convert), *patches = model.get_key_patches("diffusion_model.")[key]
    assert isinstance(weight, torch.Tensor) and callable(convert) and len(patches) == 1
    inspect.signature(convert).bind(weight, inplace=True)


def test_a_patched_object_lies_where_we_take_it_away(loaded):
    model = loaded[0].clone()
    model.add_object_patch("model_sampling", X)
    assert model.get_model_object("model_sampling") is X
    assert model.object_patches.pop("model_sampling") is X
    assert model.get_model_object("model_sampling") is model.model.model_sampling


def test_a_noise_schedule_has_what_ours_takes_over(loaded):
    own = loaded[0].get_model_object("model_sampling")
    assert len(own.sigmas) == own.num_timesteps == 1000
    assert own.zsnr is False and own.sigma_data == 1.0


def test_sdxl_has_the_embedder_of_sizes(comfy):
    import comfy.model_base

    assert "self.embedder = " in inspect.getsource(comfy.model_base.SDXL.__init__)


@pytest.mark.parametrize(
    ("file", "owner", "function", "first"),
    [
        ("server.py", "PromptServer", "send_sync", ["self", "event", "data"]),
        ("execution.py", "PromptQueue", "set_flag", ["self", "name", "data"]),
        ("execution.py", "PromptQueue", "get_tasks_remaining", ["self"]),
    ],
)
def test_the_server_has_what_jobs_ask_of_it(host_folder: Path, file, owner, function, first):
    """Read and not imported: it pulls in the whole web application."""
    tree = ast.parse((host_folder / file).read_text(encoding="utf-8"))
    (kind,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner]
    (made,) = [n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == function]
    names = [argument.arg for argument in made.args.args]
    required = len(names) - len(made.args.defaults)
    assert names[: len(first)] == first and required <= len(first)
