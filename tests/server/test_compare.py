"""Compare Settings in the real front end: the template runs, and the sheet stands on the node."""

import io
import urllib.parse

import pytest
from lcm_lora.dev.demo import COMPARE
from lcm_lora.tests.server.pages import QUEUED, new_page, open_template, pictured
from lcm_lora.tests.server.test_texts import OVERLAPS
from PIL import Image

SMALL = """(side) => {
    const latent = app.graph.nodes.find((node) => node.type === 'EmptyLatentImage');
    latent.widgets.slice(0, 2).forEach((widget) => { widget.value = side; });
    const [compare] = app.graph.nodes.filter((node) => node.type === 'LCMCompare');
    compare.widgets.find((widget) => widget.name === 'columns.values').value = '1, 2';
}"""
RUN = """async () => {
    const shown = [], ended = new Promise((resolve) => {
        for (const how of ['execution_success', 'execution_error', 'execution_interrupted']) {
            app.api.addEventListener(how, () => resolve(how), { once: true });
        }
    });
    app.api.addEventListener('executed', ({ detail }) => shown.push(detail.output));
    if (!QUEUED) return ['refused', app.lastNodeErrors];
    return [await ended, shown];
}""".replace("QUEUED", QUEUED)
SAID = """() => app.graph.nodes.find((node) => node.type === 'LCMCompare').widgets
    .find((widget) => widget.name === 'lcm_lora_text')?.element.innerText"""
# In the new rendering: where the pictures on the node come from.
PICTURES = """() => {
    const { id } = app.graph.nodes.find((node) => node.type === 'LCMCompare');
    return [...document.querySelectorAll(`[data-node-id="${id}"] img`)].map(({ src }) => src);
}"""


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_the_template_shows_its_sheet_on_the_node(browser, client, subject, host_folder, vue):
    page = new_page(browser, client)
    page.evaluate("(vue) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue)
    open_template(page, subject, COMPARE)
    side = subject.size // (1 + vue)  # or the server has the result of the first run
    page.evaluate(SMALL, side)
    how, shown = page.evaluate(RUN)
    assert how == "execution_success", shown
    page.wait_for_timeout(1500)
    pictured(page, f"compared-{'vue' if vue else 'canvas'}")
    assert page.evaluate(SAID) == "8 pictures, 2 x 4"
    if vue:  # the preview of the sheet as it grew has gone
        (source,) = page.evaluate(PICTURES)
        # Older front ends show the last preview in its place: the same sheet, made smaller.
        assert "/view?" in source or "0.16.3" in host_folder.parent.name
    previews = [output["images"][0] for output in shown if "lcm_lora_text" in output]
    query = urllib.parse.urlencode(
        {key: previews[0][key] for key in ("filename", "subfolder", "type")}
    )
    sheet = Image.open(io.BytesIO(page.request.get(f"{client.url}/view?{query}").body()))
    assert sheet.size[0] > 2 * (side - 8) and sheet.size[1] > 4 * (side - 8)
    lines = next(output["text"][0] for output in shown if "text" in output).splitlines()
    assert len(lines) == 8 and lines[-1].endswith("weight_1=1, weight_2=1.2")
    assert page.evaluate(OVERLAPS) == []
    assert not page.wrong and not page.foreign
    page.context.close()
