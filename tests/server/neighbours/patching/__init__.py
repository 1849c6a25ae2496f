"""A pack of the older kind, with the calls of well-known ones: it wraps the network of a MODEL,
adds a sampler and a scheduler to ComfyUI's lists, and exchanges the maker of previews."""

import comfy.k_diffusion.sampling
import comfy.samplers
import latent_preview


class NeighbourScale:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "scale": ("FLOAT", {"default": 1.0})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "neighbours"

    def patch(self, model, scale):
        model = model.clone()
        model.set_model_unet_function_wrapper(
            lambda apply, arguments: (
                scale * apply(arguments["input"], arguments["timestep"], **arguments["c"])
            )
        )
        return (model,)


def sample_neighbour(model, x, sigmas, **options):
    return comfy.k_diffusion.sampling.sample_euler(model, x, sigmas, **options)


def neighbour_sigmas(model_sampling, steps):
    return comfy.samplers.normal_scheduler(model_sampling, steps)


comfy.k_diffusion.sampling.sample_neighbour = sample_neighbour
comfy.samplers.KSAMPLER_NAMES.append("neighbour")
comfy.samplers.KSampler.SAMPLERS.append("neighbour")
comfy.samplers.SCHEDULER_HANDLERS["neighbour"] = comfy.samplers.SchedulerHandler(neighbour_sigmas)
comfy.samplers.SCHEDULER_NAMES.append("neighbour")

own_previewer = latent_preview.get_previewer
latent_preview.get_previewer = lambda *arguments, **named: own_previewer(*arguments, **named)

NODE_CLASS_MAPPINGS = {"NeighbourScale": NeighbourScale}
NODE_DISPLAY_NAME_MAPPINGS = {"NeighbourScale": "Scale the Network"}
