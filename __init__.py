"""LCM-LoRA for ComfyUI: the pack's entry point."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes."""
    from .nodes.catalogue import LCMLoRAExtension

    return LCMLoRAExtension()
