"""A process that trains one random network step by step, for benchmarks of the distillation.

Started with its settings as JSON in the first argument; each line on its standard input asks for
one step, each line it prints answers. Its subject is "engine" or "reference": the file beside this
one whose `start` makes ready and gives the step.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(settings: dict) -> None:
    """Answers {"memory": bytes} and then, for each line read, a step's figures."""
    package = types.ModuleType("lcm_lora")
    package.__path__ = [str(ROOT)]
    sys.modules["lcm_lora"] = package
    import torch
    from lcm_lora.training.memory import keep_freed

    if settings["keep_freed"]:
        keep_freed()
    torch.set_num_threads(settings["threads"])
    step = importlib.import_module(f"lcm_lora.dev.bench.{settings['subject']}").start(settings)
    forget_peak()
    tell(memory=memory("VmRSS"))
    for _ in sys.stdin:
        begun, used = time.perf_counter(), time.process_time()
        loss, calls, inside = step()
        tell(
            loss=loss, seconds=time.perf_counter() - begun,
            processor_seconds=time.process_time() - used, calls=calls, network_seconds=inside,
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


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
