"""LCM-LoRA for ComfyUI: the pack's entry point."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> object:
    """What ComfyUI calls to get the nodes."""
    import logging

    try:
        from .nodes.catalogue import LCMLoRAExtension
    except Exception:  # ComfyUI itself shows one line of it, without the place
        logging.getLogger("lcm_lora").exception("The nodes of LCM-LoRA could not be loaded.")
        raise
    return LCMLoRAExtension()
