"""All nodes of the pack."""

from __future__ import annotations

import sys

from comfy_api.v0_0_2 import ComfyExtension, io

from .combine import LCMLoRACombine
from .compare.node import LCMCompare
from .distill import LCMDistill, LCMDistillData, LCMTeacher
from .extract import LCMLoRAExtract
from .jobs import LCMJobResult, LCMJobStatus
from .loader import LCMLoRALoader
from .rows import LCMLoRAStack
from .sampling import LCMKSampler, LCMModelSampling, LCMSampler, LCMSchedule
from .search import LCMWeightSearch
from .stack import LCMLoRAFromStack, LCMLoRAToStack
from .vectors import LCMLoRAApply, LCMLoRASave, LCMLoRAVectorLoader
from .weigh import LCMLoRABlocks, LCMLoRAProtect

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
    LCMDistillData,
    LCMDistill,
    LCMJobStatus,
    LCMJobResult,
    LCMLoRAExtract,
    LCMLoRABlocks,
    LCMLoRAProtect,
    LCMLoRAFromStack,
    LCMLoRAToStack,
    LCMLoRAStack,
    LCMCompare,
    LCMWeightSearch,
    LCMTeacher,
]


class LCMLoRAExtension(ComfyExtension):
    async def on_load(self) -> None:
        # Imported here, because it needs the server. A tool that only reads the nodes has none.
        if "server" in sys.modules:
            from ..training.jobs import routes

            routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
