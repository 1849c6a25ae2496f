"""A process that trains one random network step by step, for benchmarks of the distillation.

Started with its settings as JSON in the first argument; each line on its standard input asks for
one step, each line it prints answers. "ours" is the engine's own step on a bank; "reference" is the
recipe of the released LCM-LoRA script rebuilt from diffusers and peft: a second network as teacher,
VAE and text encoder in every step, conditional and unconditional teacher calls apart, gradient
checkpointing as its README tells. Both train in float32 unless told otherwise, on the same weights,
pictures, captions, noise and initial LoRA, so that their losses can be compared.
"""

from __future__ import annotations

import json
import math
import sys
import time
import types
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURES, CFG, SEED, RANK = 8, 7.5, 0, 64


def main(settings: dict) -> None:
    """Answers {"ready": bytes} and then, for each line read, a step's figures."""
    package = types.ModuleType("lcm_lora")
    package.__path__ = [str(ROOT)]
    sys.modules["lcm_lora"] = package
    import torch
    from lcm_lora.dev.bench import worker  # the same file, as a part of the pack

    torch.set_num_threads(settings["threads"])
    subject = {"ours": worker.ours, "reference": worker.reference, "bank": worker.bank}
    step = subject[settings["subject"]](settings)
    forget_peak()
    tell(memory=memory("VmRSS"))
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss, calls, inside = step()
        tell(
            loss=loss, seconds=time.perf_counter() - begun, calls=calls, network_seconds=inside,
            peak=memory("VmHWM"),
        )  # fmt: skip


def tell(**told) -> None:
    print(json.dumps(told), flush=True)  # noqa: T201 (this is how the process answers)


def memory(name: str) -> int:
    """Bytes of the process by the kernel's count: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit("The peak of a process's memory can be read on Linux only.")


def forget_peak() -> None:
    """What loading took does not count."""
    Path("/proc/self/clear_refs").write_text("5")


class Clock:
    """Seconds and calls inside a network, forward and backward."""

    def __init__(self, *networks):
        import torch

        self.calls, self.seconds, self._begun = 0, 0.0, 0.0
        for network in networks:
            network.register_forward_pre_hook(self._enter)
            network.register_forward_hook(self._leave)
        backward = torch.Tensor.backward

        def timed(*args, **kwargs):
            begun = time.perf_counter()
            backward(*args, **kwargs)
            self.seconds += time.perf_counter() - begun

        torch.Tensor.backward = timed

    def _enter(self, *_):
        self._begun = time.perf_counter()

    def _leave(self, *_):
        self.calls += 1
        self.seconds += time.perf_counter() - self._begun

    def taken(self) -> tuple[int, float]:
        found = self.calls, self.seconds
        self.calls, self.seconds = 0, 0.0
        return found


def start_factor(factor, name: str) -> None:
    """A LoRA's first factor of the layer of this name (in the original UNet's naming)."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(factor[0].numel())
    torch.nn.init.uniform_(factor, -bound, bound, generator=generator)


def ours(settings: dict):
    """The engine's step, on the host's network."""
    import torch
    from lcm_lora.training.memory import keep_freed
    from lcm_lora.training.teacher import DTYPES, Teacher, enter

    keep_freed()
    enter(Path(settings["host"]))
    from lcm_lora.dev.bench.networks import FAMILIES, host_unet
    from lcm_lora.training.adapter import Adapter
    from lcm_lora.training.bank import Bank, Row, build
    from lcm_lora.training.loop import Run
    from lcm_lora.training.processes import Processes
    from lcm_lora.training.solver import Schedule
    from lcm_lora.training.spec import Spec
    from safetensors.torch import load_file

    config = FAMILIES[settings["family"]]
    dtype = DTYPES[settings["dtype"]]
    if settings["weights"]:
        network = host_unet(config, "meta", dtype).to_empty(device="cpu")
        network.load_state_dict(load_file(settings["weights"]))
    else:
        network = host_unet(config, "cpu", dtype)
    network.requires_grad_(False).eval()
    side, width = settings["side"], config["context_dim"]
    made = load_file(settings["bank"]) if settings["bank"] else random_bank(side, config)
    uncond = {"context": made["uncond"]}
    if "pooled" in made:
        uncond["pooled"] = torch.zeros_like(made["pooled"][0])
    teacher = Teacher(
        network, Schedule(acp(), "eps"), settings["family"], 4, torch.device("cpu"), dtype, uncond,
        _Sizes(), None, None,
    )  # fmt: skip
    assert made["uncond"].shape == (77, width)

    class Source:
        """The rows that the reference made of its pictures."""

        def __len__(self):
            return PICTURES

        def captions(self):
            return [str(i) for i in range(PICTURES)]

        def rows(self, numbers, _text):
            sizes = (8 * side, 8 * side, 0, 0, 8 * side, 8 * side)
            return [Row(made["latents"][number], sizes) for number in numbers]

    def text(caption: str) -> dict[str, torch.Tensor]:
        found = {"context": made["contexts"][int(caption)]}
        return found | ({"pooled": made["pooled"][int(caption)]} if "pooled" in made else {})

    folder = Path(settings["folder"])
    build(folder / "bank", Source(), text, 0.0, Processes(), lambda *_: None)
    job = str(folder)
    spec = Spec(
        host=settings["host"], checkpoint=job, output=f"{job}/x.safetensors", banks=job,
        resolution=8 * side, batch=settings["batch"], rank=RANK, guidance=(CFG,), seed=SEED,
        checkpointing=settings.get("checkpointing", "auto"),
    )  # fmt: skip
    adapter = Adapter(network, RANK, float(RANK))
    for name, layer in zip(adapter.names, adapter.layers, strict=True):
        start_factor(layer.down.data, name)
    run = Run(
        spec, folder, teacher, adapter, Bank(folder / "bank"), Processes(), None, None, lambda: ""
    )
    if spec.checkpointing == "on":
        from lcm_lora.training.memory import recompute_blocks

        recompute_blocks(network)
    clock = Clock(network)

    def step():
        loss, _ = run.one_step()
        run.step += 1
        return loss, *clock.taken()

    return step


class _Sizes:
    """What Teacher asks of the host's model for SDXL's size conditioning."""

    def __init__(self):
        from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

        self.model = types.SimpleNamespace(embedder=Timestep(256))


def random_bank(side: int, config: dict) -> dict:
    """Latents and embeddings of the right shapes, where only time and memory are asked for."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    found = {
        "latents": torch.randn(PICTURES, 4, side, side, generator=generator),
        "contexts": torch.randn(PICTURES, 77, config["context_dim"], generator=generator),
        "uncond": torch.zeros(77, config["context_dim"]),
    }
    if "num_classes" in config:
        pooled = config["adm_in_channels"] - 1536
        found["pooled"] = torch.randn(PICTURES, pooled, generator=generator)
    return found


def acp():
    """alphas_cumprod of Stable Diffusion, [1000] float32."""
    import torch

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


class Encoders:
    """The VAE's encoder and the text encoder of SD1.5's shape, random weights, and the data."""

    def __init__(self, settings: dict):
        import diffusers
        import torch
        import transformers

        torch.manual_seed(SEED)
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).requires_grad_(False)  # fmt: skip
        width = settings["width"]
        self.clip = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12,
                num_attention_heads=max(1, width // 64),
            )
        ).requires_grad_(False)  # fmt: skip
        tokens = Path(settings["host"]) / "comfy" / "sd1_tokenizer"
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(str(tokens))
        pixels = 8 * settings["side"]
        generator = torch.Generator().manual_seed(SEED)
        self.pictures = torch.rand(PICTURES, 3, pixels, pixels, generator=generator) * 2 - 1

    def latents(self, row: int):
        import torch

        generator = torch.Generator().manual_seed(row)
        told = self.vae.encode(self.pictures[row : row + 1]).latent_dist
        return told.sample(generator) * self.vae.config.scaling_factor

    def context(self, caption: str):
        ids = self.tokenizer(
            caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        return self.clip(ids)[0]


def captions() -> list[str]:
    return [f"a photo of picture number {i}" for i in range(PICTURES)]


def bank(settings: dict):
    """Writes the latents and embeddings that the reference will make in its steps, for ours."""
    import torch
    from safetensors.torch import save_file

    encoders = Encoders(settings)
    with torch.no_grad():
        save_file({
            "latents": torch.cat([encoders.latents(row) for row in range(PICTURES)]),
            "contexts": torch.cat([encoders.context(caption) for caption in captions()]),
            "uncond": encoders.context("")[0].clone(),
        }, settings["bank"])  # fmt: skip
    return lambda: (0.0, 0, 0.0)


def reference(settings: dict):
    """The released script's step."""
    import diffusers
    import peft
    import torch
    from lcm_lora.dev.bench.networks import DIFFUSERS, RECIPE
    from lcm_lora.training import draws
    from safetensors import safe_open

    names = json.loads(Path(settings["names"]).read_text())
    unets = []
    for _ in range(2):
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**DIFFUSERS[settings["family"]])
        unet.to_empty(device="cpu")
        with safe_open(settings["weights"], framework="pt") as file:
            unet.load_state_dict({n: file.get_tensor(names[n]) for n in unet.state_dict()})
        unets.append(unet.requires_grad_(False))
    teacher_unet, unet = unets
    encoders = Encoders(settings)
    unet = peft.get_peft_model(unet, peft.LoraConfig(r=RANK, lora_alpha=RANK, **RECIPE))
    for name, module in unet.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            layer = names[f"{name}.weight"].removesuffix(".weight")
            start_factor(module.lora_A["default"].weight.data, layer)
    unet.train()
    unet.enable_gradient_checkpointing()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    table, side, batch = acp(), settings["side"], settings["batch"]
    order = draws.Order([(4, side, side)] * PICTURES, batch, SEED)
    with torch.no_grad():
        empty = encoders.context("")
    clock, done = Clock(teacher_unet, unet), [0]

    def broad(x):
        return x.view(-1, 1, 1, 1)

    def x0_eps(output, z, t):
        alpha, sigma = broad(table[t].sqrt()), broad((1 - table[t]).sqrt())
        return (z - sigma * output) / alpha, output

    def f(z, t, x0):
        s = broad(10.0 * t)
        return 0.25 / (s**2 + 0.25) * z + s / (s**2 + 0.25).sqrt() * x0

    def step():
        rows = order.rows(done[0])
        eps, index, cfg = draws.draw(SEED, done[0], range(batch), (4, side, side), (CFG,))
        with torch.no_grad():
            z0 = torch.cat([encoders.latents(row) for row in rows])
            text = torch.cat([encoders.context(captions()[row]) for row in rows])
        t = 20 * index + 19
        s = (t - 20).clamp(min=0)
        z_t = broad(table[t].sqrt()) * z0 + broad((1 - table[t]).sqrt()) * eps
        x0, _ = x0_eps(unet(z_t, t, text).sample, z_t, t)
        student = f(z_t, t, x0)
        with torch.no_grad():
            x0_c, eps_c = x0_eps(teacher_unet(z_t, t, text).sample, z_t, t)
            no_text = empty.expand_as(text)
            x0_u, eps_u = x0_eps(teacher_unet(z_t, t, no_text).sample, z_t, t)
            w = cfg - 1
            x0_g, eps_g = x0_c + w * (x0_c - x0_u), eps_c + w * (eps_c - eps_u)
            z_s = broad(table[s].sqrt()) * x0_g + broad((1 - table[s]).sqrt()) * eps_g
            target = f(z_s, s, x0_eps(unet(z_s, s, text).sample, z_s, s)[0])
        loss = (((student - target) ** 2 + 0.001**2).sqrt() - 0.001).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done[0] += 1
        return float(loss.detach()), *clock.taken()

    return step


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
