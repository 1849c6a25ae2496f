"""The jobs over HTTP, under /lcm_lora/; openapi.json beside this file describes it.

Reading is GET. What changes something is POST with JSON from the same origin, and names things as
the host lists them: no path, flag or command comes from a client. Files are read in threads, so
that the server's event loop never waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from filelock import Timeout
from server import PromptServer

from .. import disk
from ..disk import disk_is_full
from ..spec import build
from . import host
from .beside import Beside
from .metrics import read
from .store import Busy, Job, NoJob, is_id

log = logging.getLogger("lcm_lora")
LARGEST = 1 << 20  # bytes of a request
LOG_PART = 1 << 16
ACTIONS = {"pause": "pause", "stop": "stop", "finish": "finish", "resume": ""}
EVENT = "lcm_lora.jobs"

beside: Beside | None = None


def register() -> None:
    """Adds the routes to the server and starts to look after the jobs; once, as the pack loads."""
    global beside
    instance = getattr(PromptServer, "instance", None)
    if instance is None or beside is not None:
        return  # not in a server, but in a tool that reads the nodes
    table = instance.routes
    for path, handler in READS.items():
        table.get(f"/lcm_lora/{path}")(partial(_answer, handler))
    for path, handler in CHANGES.items():
        table.post(f"/lcm_lora/{path}")(partial(_change, handler))

    def free() -> None:
        instance.prompt_queue.set_flag("unload_models", True)
        instance.prompt_queue.set_flag("free_memory", True)

    beside = Beside(
        host.store(), lambda: instance.prompt_queue.get_tasks_remaining(), free, host.work,
        lambda jobs: instance.send_sync(EVENT, {"jobs": jobs}), host.waiting,
    )  # fmt: skip
    beside.start()


async def _answer(handler: Callable, request: web.Request) -> web.Response:
    return await asyncio.to_thread(_response, partial(handler, request))


async def _change(handler: Callable, request: web.Request) -> web.Response:
    if wrong := _foreign(request):
        return _error(403, wrong)
    if request.content_type != "application/json":
        return _error(415, f"Content-Type must be application/json, found {request.content_type}.")
    body = bytearray()
    async for part in request.content.iter_chunked(1 << 16):
        body += part
        if len(body) > LARGEST:
            return _error(413, f"A request has at most {LARGEST} bytes.")
    return await asyncio.to_thread(_response, lambda: handler(request, _object(bytes(body))))


def _response(handler: Callable[[], Any]) -> web.Response:
    """What a handler finds, or the sentence it raises, as an answer; runs in a thread."""
    try:
        found = handler()
    except NoJob as error:
        return _error(404, str(error))
    except (Busy, Timeout):
        return _error(503, str(Busy()))
    except ValueError as error:
        return _error(400, str(error))
    except Exception as error:
        if isinstance(error, FileNotFoundError) and (deleted := _deleted(error)):
            return _error(404, str(NoJob(deleted)))
        log.exception("A request could not be answered.")
        if not isinstance(error, OSError):
            return _error(500, f"A fault of this pack: {type(error).__name__}. See ComfyUI's log.")
        if disk_is_full(error):
            return _error(507, "The server's disk is full.")
        # Without the path, which clients should not see.
        return _error(500, f"The server's disk failed: {error.strerror or type(error).__name__}.")
    return found if isinstance(found, web.Response) else _json(found)


def _deleted(error: FileNotFoundError) -> str:
    """The id of the job that was deleted while a file of it was read; "" where it is there."""
    file = Path(str(error.filename or ""))
    folder = next((folder for folder in (file, *file.parents) if is_id(folder.name)), None)
    return folder.name if folder is not None and not folder.is_dir() else ""


def _object(body: bytes) -> dict:
    """Raises ValueError if a request's body is not a JSON object."""
    try:
        told = json.loads(body or b"{}")
    except RecursionError:
        raise ValueError("The body is nested too deep.") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"The body is not JSON: {error}.") from None
    if not isinstance(told, dict):
        raise ValueError(f"The body must be a JSON object, found {type(told).__name__}.")
    return told


def _foreign(request: web.Request) -> str:
    """Why a request is not from the server's own pages; empty where it is, or from a program."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:  # the browser has compared, and knows no proxy in between
        own = site in ("same-origin", "none")
    else:
        own = origin is None or _same(origin, request.host)
    return "" if own else "Jobs are changed from ComfyUI's own page only."


def _same(origin: str, host: str) -> bool:
    """Whether they name one server; the port counts where both tell it, for proxies drop it."""
    try:
        one, other = urlsplit(origin), urlsplit(f"//{host}")
        ports = {one.port, other.port}
    except ValueError:  # it is no address
        return False
    named = one.hostname is not None and one.hostname == other.hostname
    return named and (None in ports or len(ports) == 1)


def _json(found: Any, status: int = 200) -> web.Response:
    # Without NaN, which browsers cannot read.
    return web.json_response(text=json.dumps(found, allow_nan=False), status=status)


def _error(status: int, sentence: str) -> web.Response:
    return _json({"error": sentence}, status)


def _number(request: web.Request, name: str, otherwise: int, least: int, most: int) -> int:
    text = request.query.get(name, str(otherwise))
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 16):
        raise ValueError(f"{name} must be a whole number, found {text[:40]!r}.")
    if not least <= int(text) <= most:
        raise ValueError(f"{name} must be from {least} to {most}, found {text}.")
    return int(text)


def _path(request: web.Request) -> Path:
    return host.store().path(request.match_info["id"])


def jobs(request: web.Request) -> dict:
    limit = _number(request, "limit", 100, 1, 1000)
    offset = _number(request, "offset", 0, 0, 1 << 40)
    found = host.store().jobs()
    running = sum(job.state in ("preparing", "running", "stopping") for job in found)
    shown = [job.told() for job in found[offset : offset + limit]]
    return {"jobs": shown, "running": running, "total": len(found)}


def job(request: web.Request) -> dict:
    found, path = host.store().job(request.match_info["id"]), _path(request)
    return found.told() | {
        "settings": _settings(disk.read_object(path / "spec.json")),
        "attempts": _whole(disk.read_object(path / "supervisor.json").get("crashes")),
        "samples": [
            {"step": int(file.stem.removeprefix("step-")), "name": file.name}
            for file in sorted((path / "samples").glob("step-????????.png"))
        ],
        "result": _result(found, disk.read_object(path / "result.json")),
    }


def job_log(request: web.Request) -> dict:
    """From the byte `offset` on; negative: that many bytes before the end."""
    offset = _number(request, "offset", -LOG_PART, -LOG_PART, 1 << 40)
    path = _path(request) / "log.txt"
    if not path.exists():
        return {"text": "", "offset": 0}
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        start = max(0, size + offset) if offset < 0 else min(offset, size)
        file.seek(start)
        part = file.read(LOG_PART)
    # Up to the end of a line, so that no character is cut; the rest comes with the next part.
    if len(part) == LOG_PART or not part.endswith(b"\n"):
        part = part[: part.rfind(b"\n") + 1] or part
    return {"text": part.decode("utf-8", "replace"), "offset": start + len(part)}


def metrics(request: web.Request) -> dict:
    """`rows` by `columns`; `errors`: step and the samples' distance to the teacher at 1, 2, 4."""
    first = _number(request, "from", 0, 0, 1 << 40)
    last = _number(request, "to", 1 << 40, 0, 1 << 40)
    return read(_path(request), first, last, _number(request, "points", 300, 2, 5000))


def samples(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    stem = name.removeprefix("step-").removesuffix(".png")
    path = _path(request) / "samples" / name
    if name != f"step-{stem}.png" or not (stem.isascii() and stem.isdigit()) or not path.is_file():
        return _error(404, f"There is no picture {name}.")
    return web.Response(body=path.read_bytes(), content_type="image/png")


def create(request: web.Request, told: dict) -> web.Response:
    identifier, new = host.start(build(host.Order, told, "the request"))
    return _json({"id": identifier, "new": new}, 201 if new else 200)


def act(action: str, request: web.Request, told: dict) -> dict:
    store, identifier = host.store(), request.match_info["id"]
    store.ask(identifier, ACTIONS[action], only=partial(_fits, action))
    if action == "resume":
        host.work()
    return {"id": identifier, "state": store.job(identifier).state}


def _fits(action: str, job: Job) -> bool:
    """True; raises ValueError where this cannot be asked of a job as it is."""
    state = job.state
    if action == "resume" and state not in ("paused", "failed", "lost"):
        raise ValueError(f"The job is {state}: only one that is paused or failed can go on.")
    if action == "finish" and state != "running":
        raise ValueError(f"The job is {state}: only one that trains can be finished early.")
    if action != "resume" and state in ("done", "failed"):
        raise ValueError(f"The job is {state} already.")
    return True


def delete(request: web.Request, told: dict) -> dict:
    host.store().delete(request.match_info["id"])
    return {"id": request.match_info["id"], "state": "deleted"}


def move(request: web.Request, told: dict) -> dict:
    before = told.get("before")
    if before is not None and not isinstance(before, str):
        raise ValueError(f"before must be a job's id or null, found {before!r}.")
    try:
        host.store().move(request.match_info["id"], before)
    except NoJob as error:
        if error.args[0] == request.match_info["id"]:
            raise
        raise ValueError(str(error)) from None
    return {"id": request.match_info["id"]}


def openapi(request: web.Request) -> Any:
    return json.loads(Path(__file__).with_name("openapi.json").read_text(encoding="utf-8"))


READS = {
    "jobs": jobs, "jobs/{id}": job, "jobs/{id}/log": job_log, "jobs/{id}/metrics": metrics,
    "jobs/{id}/samples/{name}": samples, "openapi.json": openapi,
}  # fmt: skip
CHANGES = {
    "jobs": create, "jobs/{id}/delete": delete, "jobs/{id}/move": move,
    **{f"jobs/{{id}}/{action}": partial(act, action) for action in ACTIONS},
}  # fmt: skip


def _settings(spec: dict) -> dict:
    """The description without any path of the server's."""
    hidden = ("host", "host_flags", "checkpoint", "output", "banks", "embeddings", "loras", "data")
    data = spec.get("data") if isinstance(spec.get("data"), dict) else {}
    shown = {k: v for k, v in spec.items() if k not in hidden}
    return shown | {"data": {k: v for k, v in data.items() if k != "path"}}


def _result(found: Job, told: dict) -> dict | None:
    if found.state != "done":
        return None
    return {"lora_name": found.lora_name, "sha256": told.get("sha256"), "made": told.get("made")}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
