"""A workflow as the front end saves it -> the prompt that the server's API takes.

For workflows like ours: no subgraphs, no bypassed nodes. The front end saves every widget as an
input with its name, so nothing has to be asked of a server.
"""

from __future__ import annotations

# A seed's widget brings a second one, which is no input of the node.
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
NOTES = {"Note", "MarkdownNote"}


def to_api(workflow: dict) -> dict[str, dict]:
    """Node id -> {"class_type", "inputs"}, as the front end's own "export (API)" gives it.

    Raises ValueError when a node's saved values do not match its widgets.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs: dict = {}
        values = list(node.get("widgets_values", []))
        for name in _widgets(node["inputs"]):
            if not values:
                raise ValueError(f"Node {node['id']} ({node['type']}) has too few saved values.")
            inputs[name] = values.pop(0)
            if "seed" in name and values and values[0] in CONTROLS:
                values.pop(0)
        for slot in node["inputs"]:
            if slot.get("link") is not None:
                inputs[slot["name"]] = links[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widgets(slots: list[dict]) -> list[str]:
    """Names of the widgets in the order of their saved values.

    That is the order of the inputs, but for a dynamic combo: its nested inputs ("count.weight_1")
    are listed before it, and its value is saved before theirs.
    """
    names = [slot["name"] for slot in slots if "widget" in slot]
    place: dict[str, int] = {}
    for index, name in enumerate(names):
        place.setdefault(name.partition(".")[0], index)
    return sorted(names, key=lambda name: (place[name.partition(".")[0]], "." in name))
