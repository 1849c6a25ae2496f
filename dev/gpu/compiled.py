"""The engine's step with torch.compile for each block: how long the first steps take, what it
gains, and whether Dynamo gave up on some blocks."""

from __future__ import annotations

import collections
import logging
import statistics
import time

import torch

from ...training.memory import compile_blocks
from ..bench import engine
from ..bench.timing import timed
from .distill import case_of, title_of
from .kit import Kit


class Seen(logging.Handler):
    """Collects what Dynamo says when it gives up on a function."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "recompile_limit" in text or "cache_size_limit" in text:
            self.lines.append(text.splitlines()[0][:200])


def run(kit: Kit) -> None:
    logging.getLogger("torch._dynamo").addHandler(seen := Seen())
    case = case_of(kit, "SD1.5", 2 if kit.tiny else 4)
    title = title_of(case)
    plain = kit.seconds(engine.prepare(case), 5, 3)
    kit.add(title, "engine", "step", "ms", [1000 * s for s in plain])
    # The processor's compiler takes minutes; how Dynamo cuts and guards is the same.
    options = {"backend": "aot_eager"} if kit.tiny else {}
    begun = time.monotonic()

    def called(*_: object) -> None:
        """Tells how far the first step is: its time may end before it does."""
        if not first:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            case = f"{title}, a network call of the first step"
            kit.add(case, "engine, compiled", "ended after", "s", time.monotonic() - begun)
            kit.add(case, "engine, compiled", "graphs", "", graphs)

    def change(network: torch.nn.Module) -> None:
        compile_blocks(network, **options)
        network.register_forward_hook(called)

    first: list[float] = []
    step = engine.prepare(case, change)
    while len(first) < (3 if kit.tiny else 12) and kit.left() > 5:
        first.append(timed(step).seconds)
        kit.add(title, "engine, compiled", f"step {len(first)}", "s", first[-1])
    if len(first) < 3:
        return
    late = first[-3:]
    kit.add(title, "engine, compiled", "step", "ms", [1000 * s for s in late])
    kit.bar(
        f"{title}: time, compiled / plain", statistics.median(late) / statistics.median(plain), 1
    )
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    kit.add(title, "engine, compiled", "graphs", "", graphs)
    kit.bar(f"{title}: times Dynamo reached its limit of recompiles", len(seen.lines), 0)
    for text, count in collections.Counter(seen.lines).most_common(5):
        kit.note(f"{count} times: {text}")
