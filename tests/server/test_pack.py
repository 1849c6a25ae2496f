"""What the pack does to a ComfyUI that starts with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "nodes.json").read_text(encoding="utf-8"))

IMPORT = """
import asyncio, importlib.util, json, os, sys, time
sys.path.insert(0, sys.argv[1])
base, root = sys.argv[2:4]
sys.argv = ["comfyui", "--cpu", "--base-directory", base]
import comfy.options
comfy.options.enable_args_parsing()
import nodes, comfy_api.v0_0_2, latent_preview, comfy.sample, comfy.sd
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
import folder_paths
for kind in folder_paths.folder_names_and_paths:
    folder_paths.get_filename_list(kind)  # which the host keeps for every loader
before, touched = set(sys.modules), []

def held(owner):
    return {
        name: (id(value), len(value) if isinstance(value, (list, dict, set)) else 0)
        for name, value in vars(owner).items() if not name.startswith("__")
    }

def host():
    # What other packs see: the names in the host's modules and classes, and what lists hold.
    seen = {}
    for name in before:
        module = sys.modules[name]
        if (getattr(module, "__file__", None) or "").startswith(sys.path[0]):
            seen[name] = held(module)
            for key, value in vars(module).items():
                if isinstance(value, type) and value.__module__ == name:
                    seen[name + "." + key] = held(value)
    return {f"{owner}.{name}": value for owner, all in seen.items() for name, value in all.items()}

found = host()

def watch(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "subprocess", "os.system")):
        touched.append(event)
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        # A number is a file that was opened by name before; Python keeps what it compiles.
        if writes and not isinstance(path, int) and "__pycache__" not in str(path):
            touched.append(f"open {path}")

sys.addaudithook(watch)
spec = importlib.util.spec_from_file_location(
    "pack", root + "/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
begun = time.process_time()
spec.loader.exec_module(pack)

async def count():
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    return len([node.GET_SCHEMA() for node in await extension.get_node_list()])

counted = asyncio.run(count())
seconds = time.process_time() - begun
now = host()
changed = sorted(name for name in found.keys() | now.keys() if found.get(name) != now.get(name))
new = sorted({name.split(".")[0] for name in set(sys.modules) - before} - {"pack"})
print(json.dumps(
    {"nodes": counted, "new": new, "touched": touched, "changed": changed, "seconds": seconds}))
"""


def test_every_node_is_there_with_its_words(client):
    nodes = client.get("/object_info")
    for name, node in GOLDEN.items():
        info = nodes[name]
        assert info["description"] and info["display_name"]
        assert info["category"].split("/")[0] == "LCM-LoRA"
        assert all(info["output_tooltips"])
        assert len(info["output"]) == len(node["outputs"])
        for side in ("required", "optional"):
            for spec in info["input"].get(side, {}).values():
                assert spec[1]["tooltip"]


def test_the_help_pages_are_served(client):
    import urllib.request

    for name in GOLDEN:
        address = f"{client.url}/extensions/lcm-lora/docs/{name}.md"
        with urllib.request.urlopen(address, timeout=30) as page:
            assert page.read().startswith(b"# ")


def test_the_languages_are_served(client):
    served = client.get("/i18n")
    languages = {path.parent.name for path in (ROOT / "locales").glob("*/nodeDefs.json")}
    # English has the names that the front end does not take from the schemas.
    assert served["en"]["nodeDefs"].keys() <= GOLDEN.keys()
    for language in languages - {"en"}:
        assert GOLDEN.keys() <= served[language]["nodeDefs"].keys()
        assert served[language]["commands"]["lcm_lora_jobs"]["label"]


def test_the_nodes_that_beginners_need_are_among_the_essentials(client):
    nodes = client.get("/object_info")
    essential = {name for name in GOLDEN if nodes[name].get("essentials_category")}
    assert essential == {"LCMLoRALoader", "LCMLoRAStack", "LCMKSampler"}


def test_the_workflows_are_offered_as_templates(client):
    offered = client.get("/workflow_templates")["lcm-lora"]
    shipped = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert shipped == set(offered)


def imported(folder: Path) -> dict:
    """What happens when a ComfyUI that has all of its own imports the pack."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT, os.environ["LCM_LORA_TEST_HOST"], str(folder), str(ROOT)],
        capture_output=True, text=True, timeout=240, cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_it_connects_writes_changes_and_brings_in_nothing(tmp_path):
    """Beside ComfyUI's own modules the pack loads none, so it costs next to nothing at start; and
    nothing of theirs is exchanged or registered."""
    effects = imported(tmp_path)
    del effects["seconds"]
    assert effects == {"nodes": len(GOLDEN), "new": [], "touched": [], "changed": []}


@pytest.mark.faults  # it reads a clock, which the tests must not use
def test_importing_it_takes_a_tenth_of_a_second(tmp_path):
    # The very first import also compiles the files.
    assert min(imported(tmp_path)["seconds"] for _ in range(3)) < 0.1
