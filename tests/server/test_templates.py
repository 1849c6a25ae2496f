"""The shipped workflows in the real front end, with its nodes drawn in both ways."""

import json
from pathlib import Path

import pytest
from lcm_lora.dev.workflow import to_api
from lcm_lora.tests.server.pages import TEMPLATES, new_page, pictured

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
OF_FILES = {
    "CheckpointLoaderSimple", "LCMLoRALoader", "LCMLoRAVectorLoader", "LCMDistill", "LoadImage",
    "ControlNetLoader",
}  # fmt: skip
OPENED = """async ([templates, name, vue]) => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
    const answer = await fetch(`${templates}/${name}.json`);
    await app.loadGraphData(await answer.json(), true, true, name);
    const { output } = await app.graphToPrompt();
    return output;
}"""


@pytest.fixture(scope="module")
def page(browser, client):
    """One for all, for opening it takes longer than what is tried there."""
    made = new_page(browser, client)
    yield made
    made.context.close()


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_opens_and_gives_the_prompt_that_we_run(page, path, vue):
    shown = page.evaluate(OPENED, [TEMPLATES, path.stem, vue])
    workflow = json.loads(path.read_text(encoding="utf-8"))
    expected = to_api(workflow)
    assert shown.keys() == expected.keys()
    for node, each in expected.items():
        assert shown[node]["class_type"] == each["class_type"]
        # A seed is drawn anew, and lists of files hold those of this machine.
        found = {k: v for k, v in shown[node]["inputs"].items() if k in each["inputs"]}
        assert found.keys() == each["inputs"].keys()
        links = {k: v for k, v in each["inputs"].items() if isinstance(v, list)}
        assert links.items() <= found.items()
        same = {k: v for k, v in each["inputs"].items() if isinstance(v, int | float | str)}
        assert {k: found[k] for k in same if k != "seed"} == {
            k: v for k, v in same.items() if k != "seed"
        }
    marked = page.evaluate("app.graph.nodes.filter((n) => n.has_errors).map((n) => n.type)")
    assert set(marked) <= OF_FILES, "only what names a file that is not here is marked"
    page.wait_for_timeout(300)
    if vue:
        drawn = page.locator("[data-node-id]").count()
        assert drawn >= len(expected)
    pictured(page, f"{path.stem}-{'vue' if vue else 'canvas'}")
    assert not page.wrong and not page.foreign
