"""Saved workflows hold widgets by position: what has landed keeps its ids, order and defaults.

`python3 dev test --update-golden` records nodes and inputs that are new, at the end only.
"""

import json
import re
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "nodes.json"
OF_FILES = re.compile(r"lora_name|checkpoint|style_lora|start_from|lora_\d+")


def described(item) -> dict:
    about = {"id": item.id, "type": item.get_io_type()}
    for name in ("default", "options", "min", "max"):
        value = getattr(item, name, None)
        # Combos of files change with the files.
        if value is not None and not (name == "options" and OF_FILES.fullmatch(item.id)):
            about[name] = value
    if item.get_io_type() == "COMFY_DYNAMICCOMBO_V3":
        about["options"] = {
            option.key: [described(inner) for inner in option.inputs] for option in item.options
        }
    return about


def schemas() -> dict:
    from lcm_lora.nodes.catalogue import NODES

    nodes = {}
    for node in NODES:
        schema = node.define_schema()
        nodes[schema.node_id] = {
            "inputs": [described(item) for item in schema.inputs],
            "outputs": [output.get_io_type() for output in schema.outputs],
        }
    return nodes


def without_new_options(now, landed):
    """A list of choices may grow at its end: a saved workflow holds the choice by its name."""
    options = landed.get("options") if isinstance(landed, dict) else None
    if not isinstance(options, list):
        return now
    return now | {"options": now.get("options", [])[: len(options)]}


def test_nodes_are_as_they_landed(comfy, request):
    current = schemas()
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    for name, node in golden.items():
        assert name in current, f"{name} is gone"
        for side in ("inputs", "outputs"):
            present = current[name][side][: len(node[side])]
            present = [
                without_new_options(*pair) for pair in zip(present, node[side], strict=False)
            ]
            assert present == node[side], f"{name}: {side} may only be added at the end"
    if request.config.getoption("--update-golden"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")
    else:
        assert current == golden, "new inputs or nodes: record them with --update-golden"


def test_every_node_explains_itself(comfy):
    from lcm_lora.nodes.catalogue import NODES

    for node in NODES:
        schema = node.define_schema()
        assert schema.description and schema.display_name and schema.search_aliases
        assert schema.category.split("/")[0] == "LCM-LoRA"
        for item in [*schema.inputs, *schema.outputs]:
            assert item.tooltip, f"{schema.node_id}: no tooltip on {item}"
