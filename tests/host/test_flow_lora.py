"""LoRAs for transformers: every class of the host, every dialect that its key map has."""

from __future__ import annotations

import pytest
from lcm_lora.tests.host.flow_models import (
    CONFIGS,
    by_host,
    dialects,
    file_of,
    flow_model,
)
from lcm_lora.tests.host.tiny_lora import patched_weights


def assert_same_weights(one, other, limit: float = 1e-5) -> None:
    one, other = patched_weights(one), patched_weights(other)
    assert one.keys() == other.keys() and one
    for key, weight in one.items():
        assert (weight - other[key]).norm() <= limit * other[key].norm(), key


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_dialect_does_what_the_hosts_own_loader_does(comfy, kind):
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.formats.wire import from_wire, to_wire
    from lcm_lora.lora.host import apply

    model = flow_model(kind)
    for dialect, names in dialects(model).items():
        file = file_of(model, names)
        expected = by_host(model, file)
        vector = parse(file, {}, dialect)
        for one in (vector, from_wire(to_wire(vector))):
            patched, _, coverage = apply(model, None, one, 1.0, 0.0)
            assert coverage.taken == coverage.total and not coverage.left_over, str(coverage)
            assert_same_weights(patched, expected)
        # What is saved is taken by the host's own loader, and does the same.
        assert_same_weights(by_host(model, to_wire(vector)), expected)
