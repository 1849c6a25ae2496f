"""The shipped workflows in the real front end, with its nodes drawn in both ways."""

import json
import re
from pathlib import Path

import pytest
from lcm_lora.dev.workflow import to_api
from lcm_lora.tests.server.pages import files_here, new_page, open_template, pictured

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
OPENED = """async ([workflow, name, vue]) => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
    await app.loadGraphData(workflow, true, true, name);
    const made = await app.graphToPrompt();
    return [made.output, made.workflow.nodes];
}"""


@pytest.fixture(scope="module")
def page(browser, client):
    """One page for all tests, because opening it takes longer than the tests."""
    made = new_page(browser, client)
    yield made
    made.context.close()


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_opens_without_a_warning_and_gives_the_prompt_that_we_run(page, subject, path, vue):
    text = path.read_text(encoding="utf-8")
    for official, own in files_here(subject).items():
        text = text.replace(official, own)
    workflow = json.loads(text)
    kinds = page.evaluate("Object.keys(window.LiteGraph.registered_node_types)")
    if path.stem == "Live painting" and "Painter" not in kinds:
        pytest.skip("this ComfyUI has no Painter node")
    prompt, page_nodes = page.evaluate(OPENED, [workflow, path.stem, vue])
    page.wait_for_timeout(500)  # missing files are reported a moment later
    pictured(page, f"{path.stem}-{'vue' if vue else 'canvas'}")
    for warning in ("text=/errors? found|missing/i", ".p-toast-message", "[role=dialog]"):
        shown = page.locator(warning)
        assert shown.count() == 0, shown.first.inner_text()
    expected = to_api(workflow)
    for key, node in expected.items():
        assert prompt[key]["class_type"] == node["class_type"]
        if node["class_type"] == "Painter":
            node["inputs"].pop("mask")  # the name under which it uploads its picture
        # It adds inputs that are newer than the workflow.
        assert {name: prompt[key]["inputs"].get(name) for name in node["inputs"]} == node["inputs"]
    if vue:
        assert page.locator("[data-node-id]").count() >= len(expected)
    else:  # an empty field says what to write there, not its id
        shown = page.locator("textarea").evaluate_all("all => all.map((each) => each.placeholder)")
        assert not [text for text in shown if re.fullmatch(r"\w+(\.\w+|_\w+)+", text)]
    if path.stem == "Merge three LoRAs into one (SDXL)":
        # Without a widget of its own that changes the seed, and with it the sum, at every run.
        saved, again = (
            next(node["widgets_values"] for node in nodes if node["type"] == "LCMLoRACombine")
            for nodes in (workflow["nodes"], page_nodes)
        )
        assert again == saved
    assert not page.wrong and not page.foreign


def test_the_browser_of_templates_shows_titles_and_cards_and_opens_one(page):
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_role("dialog").get_by_text("LCM-LoRA", exact=True).click()
    cards = page.locator("[data-testid^='template-workflow-']")
    cards.nth(len(WORKFLOWS) - 1).wait_for()
    # Those in view; the others load when they come into it.
    page.wait_for_function("""() =>
        [...document.querySelectorAll("[data-testid^='template-workflow-'] img")]
        .filter((image) => image.naturalWidth).length >= 4""")
    pictured(page, "templates")
    titles = [card.locator("h3").inner_text() for card in cards.all()]
    assert sorted(titles) == [path.stem for path in WORKFLOWS]
    page.get_by_test_id(f"template-workflow-{WORKFLOWS[0].stem}").click()
    page.wait_for_function("app.graph.nodes.some((node) => node.type === 'LCMKSampler')")
    page.get_by_text(WORKFLOWS[0].stem[:15]).first.wait_for()  # its tab
    assert not page.wrong


def test_its_note_and_titles_are_in_the_language_of_the_page(page_in, subject):
    page = page_in("ko")
    open_template(page, subject, "Distil an LCM-LoRA")
    note, titles = page.evaluate("""() => {
        const note = app.graph.nodes.find(({ type }) => type === 'MarkdownNote');
        return [note.widgets[0].value, app.graph.nodes.map(({ title }) => title)];
    }""")
    page.wait_for_timeout(500)
    pictured(page, "template-korean")
    assert note.startswith("**LCM-LoRA 증류**")
    assert {"사용법", "손실"} <= set(titles)
    # A title of another graph is the user's own.
    graph = page.evaluate("app.graph.serialize()")
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] == "PreviewImage"]
    graph["nodes"][0] |= {"title": "Loss", "inputs": []}
    graph["links"] = []
    page.evaluate("(graph) => app.loadGraphData(graph, true, true, 'mine')", graph)
    titles = page.evaluate("app.graph.nodes.map(({ title }) => title)")
    assert "Loss" in titles


@pytest.mark.parametrize(
    ("stem", "files"),
    [("1 Text to image (SD1.5)", 2), ("Merge three LoRAs into one (SDXL)", 4)],
)
def test_files_that_are_missing_are_offered(page, stem, files):
    """The user has none of them."""
    page.keyboard.press("Escape")  # older front ends may still offer those of another workflow
    path = next(path for path in WORKFLOWS if path.stem == stem)
    page.evaluate(OPENED, [json.loads(path.read_text(encoding="utf-8")), path.stem, False])
    details = page.get_by_text("View details")
    # Older front ends show them at once, with their sizes.
    offered = page.get_by_text(re.compile(r"^Download( \(.*\))?$"))
    details.or_(offered).first.wait_for()
    if details.count():
        details.click()
    offered.nth(files - 1).wait_for()
    pictured(page, f"missing files {files}")
    assert offered.count() == files
