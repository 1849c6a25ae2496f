"""Every node of the pack."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .loader import LCMLoRALoader
from .sampling import LCMKSampler, LCMModelSampling, LCMSampler, LCMSchedule
from .vectors import LCMLoRAApply, LCMLoRACombine, LCMLoRASave, LCMLoRAVectorLoader

NODES: list[type[io.ComfyNode]] = [
    LCMLoRALoader,
    LCMKSampler,
    LCMLoRAVectorLoader,
    LCMLoRACombine,
    LCMLoRAApply,
    LCMLoRASave,
    LCMModelSampling,
    LCMSchedule,
    LCMSampler,
]


class LCMLoRAExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
