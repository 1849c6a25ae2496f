"""axe-core, which finds faults of a page's accessibility. A test runs it in the page."""

import tarfile

import pytest
from lcm_lora.dev import environment
from lcm_lora.dev.npm import fetched

PACKAGE = "axe-core@4.14.1"
DIGEST = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"


def script() -> str:
    """Its source. Skips the test where npm cannot fetch it."""
    folder = environment.cache() / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        archive = fetched(PACKAGE, DIGEST, folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    with tarfile.open(archive) as tar:
        return tar.extractfile("package/axe.min.js").read().decode()


def violations(page, selector: str) -> list[str]:
    """What is wrong in the elements of that selector, by every rule of axe-core that judges WCAG A,
    AA or a best practice, other than those about a page as a whole."""
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(script())
    found = page.evaluate("(selector) => axe.run(selector)", selector)["violations"]
    return [
        f"{rule['id']}: {node['target']} {node['failureSummary']}"
        for rule in found
        for node in rule["nodes"]
    ]
