"""The page that says which models were tested, and how, says what the tests do."""

from __future__ import annotations

import re
from pathlib import Path

from lcm_lora.dev.environment import PRIMARY
from lcm_lora.tests.host import tiny_flow
from lcm_lora.tests.host.flow_models import CONFIGS, WITHOUT_NUMBERS, dialects, flow_model
from lcm_lora.tests.host.test_sampling_flow import flow_classes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
OF_TEMPLATES = ("QwenImage", "ZImage", "Flux")  # tests/server/test_flow_templates.py draws them


def rows() -> dict[str, list[str]]:
    """The cells after the class, by the class."""
    cells = re.findall(r"^\| (\w+) \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    tables = {name: [cell.strip() for cell in text.split("|")] for name, text in cells}
    return {name: row for name, row in tables.items() if len(row) == 4}


def test_it_lists_what_the_tests_sample_and_merge():
    for name, (sampling, loras, _, _) in rows().items():
        has_runs = name in tiny_flow.NETWORKS or name in OF_TEMPLATES
        assert sampling == ("whole runs" if has_runs else "schedule" * (name in flow_classes())), (
            name
        )
        tested = "numbers" * (name in CONFIGS) + "shapes" * (name in WITHOUT_NUMBERS)
        assert loras == tested, name
    assert rows().keys() == {*flow_classes(), *CONFIGS, *WITHOUT_NUMBERS}


def test_it_names_the_dialects_and_where_the_class_is(comfy):
    import comfy.supported_models as classes

    is_newest, is_oldest = (v in comfy.host.parent.name for v in (PRIMARY, "0.16.3"))
    for name, (_, loras, named, on_oldest) in rows().items():
        there = hasattr(classes, name)
        assert there or not is_newest, name
        assert not is_oldest or there == (on_oldest == "yes"), name
        if is_newest and loras:
            assert set(named.split(", ")) == dialects(flow_model(name, "meta")).keys(), name
