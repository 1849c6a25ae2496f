"""Imports go one way, and the pack does nothing that a pack must not do."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK = ("nodes", "lora", "samplers", "search", "training")
FILES = [ROOT / "__init__.py", *(p for part in PACK for p in sorted((ROOT / part).rglob("*.py")))]

# What each part of the pack may import from the others.
MAY = {
    "nodes": {"nodes", "lora", "samplers", "search", "training"},
    "search": {"search", "lora", "samplers"},
    "training": {"training", "lora", "samplers"},
    "lora": {"lora"},
    "samplers": {"samplers"},
}
HOST = {
    "comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview",
    "nodes", "server", "execution", "app", "utils",
}  # fmt: skip
STANDARD = sys.stdlib_module_names - {"pickle", "marshal", "shelve"}
# What ComfyUI itself installs.
LIBRARIES = {
    "torch", "safetensors", "numpy", "tqdm", "PIL", "psutil", "filelock", "aiohttp",
    "scipy",
    "regex",  # with transformers, which requires it
}  # fmt: skip
# A program of its own, which registers the pack under this name; and one that runs on a cluster.
ELSEWHERE = {"training/run.py": {"lcm_lora"}, "training/cluster/entry.py": {"ray"}}


def imports(path: Path) -> list[tuple[str, int]]:
    """(dotted name, level) of every import in a file, inside functions too.

    `from .a import b` counts as .a and as .a.b, because b may be a module.
    """
    imported = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            imported.append((module, node.level))
            inner = (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
            imported += [(name, node.level) for name in inner]
    return imported


def may_touch_the_host(path: Path) -> bool:
    folder = path.relative_to(ROOT).parts[0]
    return folder == "nodes" or path.name in ("host.py", "teacher.py", "routes.py")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT).parts
    for name, level in imports(path):
        if level == 0:
            root = name.partition(".")[0]
            allowed = STANDARD | LIBRARIES | (HOST if may_touch_the_host(path) else set())
            allowed |= ELSEWHERE.get(named(path), set())
            assert root in allowed, f"{named(path)} imports {name}"
            assert root != "comfy_extras", f"{named(path)} imports {name}, which moves"
        elif len(parts) > 1:
            depth = len(parts) - 1
            assert level <= depth + 1, f"{named(path)} imports from outside the pack"
            target = parts[0] if level <= depth else name.partition(".")[0]
            assert target in MAY[parts[0]], f"{named(path)} imports {target}"


def module(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_modules(path: Path, modules: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The pack's modules that a file imports, inside functions too."""
    folder, targets = path.relative_to(ROOT).parts[:-1], set()
    for name, level in imports(path):
        base = tuple(name.split(".")) if name else ()
        if level:
            base = folder[: len(folder) - level + 1] + base
        elif base[0] == "lcm_lora":
            base = base[1:]
        targets |= {base[:length] for length in range(1, len(base) + 1)}
    return targets & modules


def test_there_are_no_import_circles():
    modules = {module(path) for path in FILES}
    graph = {module(path): imported_modules(path, modules) for path in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_entry_point_imports_nothing_until_it_is_called():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_pickle_no_eval_no_shell(path):
    text = path.read_text(encoding="utf-8")
    matches = re.findall(
        r"torch\.load\(|\bpickle\b\.|(?<!\.)\b(?:eval|exec)\(|shell=True|os\.system", text
    )
    assert not matches


def test_only_the_host_files_of_lora_and_samplers_know_comfyui():
    touching = {
        named(path) for path in FILES
        for name, level in imports(path)
        if level == 0 and name.partition(".")[0] in HOST
        and path.relative_to(ROOT).parts[0] in ("lora", "samplers")
    }  # fmt: skip
    assert touching == {
        "lora/host.py", "lora/weights/host.py", "samplers/host.py", "samplers/process/host.py",
    }  # fmt: skip
