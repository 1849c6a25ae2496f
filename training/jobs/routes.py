"""The jobs over HTTP, under /lcm_lora/, as openapi.json beside this file describes them.

GET reads. POST changes something; it takes JSON from the same origin, and files by the names that
ComfyUI lists: no path, flag or command comes from a client. Handlers run in threads, so that the
server's event loop never waits.
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
from ..schema import build, schema
from ..state import checkpoints
from ..state.sheets import prompts
from . import host
from .beside import Beside
from .job import Job, NoJob
from .metrics import read
from .order import DataOrder, Order, TeacherOrder, again
from .records import Attempt, Result
from .states import ACTIVE
from .store import ORDER, WORKFLOW, Busy

log = logging.getLogger("lcm_lora")
LARGEST = 1 << 20  # bytes of a request
LOG_PART = 1 << 16
LONGEST_TITLE, MOST_STEPS = 200, 1_000_000
ACTIONS = {"pause": "pause", "stop": "stop", "finish": "finish", "resume": ""}
EVENT = "lcm_lora.jobs"

Handler = Callable[[web.Request], Any]
ChangeHandler = Callable[[web.Request, dict[str, Any]], Any]
beside: Beside | None = None


def register() -> None:
    """Adds the routes to the server and starts to watch the jobs; once, when the pack loads."""
    global beside
    instance = getattr(PromptServer, "instance", None)
    if instance is None or beside is not None:
        return  # a tool that reads the nodes without a server
    table = instance.routes
    for path, handler in READS.items():
        table.get(f"/lcm_lora/{path}")(partial(_answer, handler))
    for path, change in CHANGES.items():
        table.post(f"/lcm_lora/{path}")(partial(_change, change))

    def free() -> None:
        instance.prompt_queue.set_flag("unload_models", True)
        instance.prompt_queue.set_flag("free_memory", True)

    beside = Beside(
        host.store(),
        lambda: instance.prompt_queue.get_tasks_remaining(),
        free,
        host.work,
        lambda: instance.send_sync(EVENT, {}),
        host.waiting,
    )
    beside.start()


async def _answer(handler: Handler, request: web.Request) -> web.Response:
    return await asyncio.to_thread(_response, request, lambda: handler(request))


async def _change(handler: ChangeHandler, request: web.Request) -> web.Response:
    """Checks and reads a request that changes something, then answers it."""
    if reason := _foreign(request):
        return _error(403, reason)
    if request.content_type != "application/json":
        return _error(415, f"Content-Type must be application/json, found {request.content_type}.")
    body = bytearray()
    async for part in request.content.iter_chunked(1 << 16):
        body += part
        if len(body) > LARGEST:
            return _error(413, f"A request may have at most {LARGEST} bytes.")
    answer = lambda: handler(request, _object(bytes(body)))  # noqa: E731
    return await asyncio.to_thread(_response, request, answer)


def _response(request: web.Request, handler: Callable[[], Any]) -> web.Response:
    """The handler's answer. Turns its errors into a status and a sentence; `_change` answers errors
    of the request itself."""
    try:
        with host.store().existing(request.match_info.get("id", "")):
            content = handler()
    except NoJob as error:
        return _error(404, str(error))
    except (Busy, Timeout):
        return _error(503, str(Busy()))
    except ValueError as error:
        return _error(400, str(error))
    except Exception as error:
        log.exception("A request could not be answered.")
        if not isinstance(error, OSError):
            return _error(500, f"A fault of this pack: {type(error).__name__}. See ComfyUI's log.")
        if disk.disk_is_full(error):
            return _error(507, "The server's disk is full.")
        # Without the path, which clients should not see.
        return _error(500, f"The server's disk failed: {error.strerror or type(error).__name__}.")
    return content if isinstance(content, web.Response) else _json(content)


def _object(body: bytes) -> dict[str, Any]:
    """Raises ValueError if a request's body is not a JSON object."""
    try:
        content = json.loads(body or b"{}")
    except RecursionError:
        raise ValueError("The body is nested too deeply.") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"The body is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"The body must be a JSON object, found {type(content).__name__}.")
    return content


def _foreign(request: web.Request) -> str:
    """An error if a page of another site sent the request, else ""."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:  # the browser has compared the addresses before any proxy
        is_own = site in ("same-origin", "none")
    else:
        is_own = origin is None or _same(origin, request.host)
    return "" if is_own else "Jobs can be changed from ComfyUI's own page only."


def _same(origin: str, host: str) -> bool:
    """Whether both name one server. Ports are compared if both have one, since proxies drop it."""
    try:
        one, other = urlsplit(origin), urlsplit(f"//{host}")
        ports = {one.port, other.port}
    except ValueError:  # not an address
        return False
    is_one_name = one.hostname is not None and one.hostname == other.hostname
    return is_one_name and (None in ports or len(ports) == 1)


def _json(content: Any, status: int = 200) -> web.Response:
    # Without NaN, which browsers cannot read.
    return web.json_response(text=json.dumps(content, allow_nan=False), status=status)


def _error(status: int, sentence: str) -> web.Response:
    return _json({"error": sentence}, status)


def _number(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 16):
        raise ValueError(f"{name} must be a whole number, found {text[:40]!r}.")
    if not least <= int(text) <= most:
        raise ValueError(f"{name} must be from {least} to {most}, found {text}.")
    return int(text)


def _path(request: web.Request) -> Path:
    return host.store().path(request.match_info["id"])


def jobs(request: web.Request) -> dict[str, Any]:
    limit = _number(request, "limit", 100, 1, 1000)
    offset = _number(request, "offset", 0, 0, 1 << 40)
    listed = host.store().jobs()
    running = sum(job.state in ACTIVE for job in listed)
    shown = [job.public() for job in listed[offset : offset + limit]]
    return {"jobs": shown, "running": running, "total": len(listed)}


def job(request: web.Request) -> dict[str, Any]:
    store = host.store()
    described, path = store.job(request.match_info["id"]), _path(request)
    order = disk.read_object(path / ORDER)
    result = Result.read(path) or Result()
    drawn = sorted((path / "samples").glob("step-????????.png"))
    made = {"lora_name": described.lora_name, "sha256": result.sha256, "made": result.made}
    return described.public() | {
        "settings": _settings(disk.read_object(path / "spec.json")),
        "attempts": (Attempt.read(path) or Attempt()).crashes,
        "samples": [
            {"step": int(file.stem.removeprefix("step-")), "name": file.name} for file in drawn
        ],
        "prompts": prompts(drawn[-1]) if drawn else [],
        "checkpoints": checkpoints.steps(store.checkpoints(described.id)),
        "order": again(order, described.steps) if order else None,
        "workflow": (path / WORKFLOW).is_file(),
        "result": made if described.state == "done" else None,
    }


def workflow(request: web.Request) -> web.Response:
    """The graph that ordered the job."""
    file = _path(request) / WORKFLOW
    if not file.is_file():
        return _error(404, "The job has no workflow: it was started over HTTP, not from a graph.")
    return web.Response(body=file.read_bytes(), content_type="application/json")


def job_log(request: web.Request) -> dict[str, Any]:
    """The log from byte `offset` on. A negative offset counts from the end."""
    offset = _number(request, "offset", -LOG_PART, -LOG_PART, 1 << 40)
    path = _path(request) / "log.txt"
    if not path.exists():
        return {"text": "", "offset": 0}
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        start = max(0, size + offset) if offset < 0 else min(offset, size)
        file.seek(start)
        part = file.read(LOG_PART)
    # Up to the end of a line, so that no character is cut; the next part has the rest.
    if len(part) == LOG_PART or not part.endswith(b"\n"):
        part = part[: part.rfind(b"\n") + 1] or part
    return {"text": part.decode("utf-8", "replace"), "offset": start + len(part)}


def metrics(request: web.Request) -> dict[str, Any]:
    """The metrics as rows, and the figures of each sampling; see metrics.read."""
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


def create(request: web.Request, body: dict[str, Any]) -> web.Response:
    identifier, new, _ = host.start(build(Order, body, "the request"))
    return _json({"id": identifier, "new": new}, 201 if new else 200)


def estimate(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
    """What a job would take, or why it would be refused. A refusal is no HTTP error here, because
    the user is still choosing settings."""
    order = build(Order, body, "the request")
    try:
        return host.estimate(order).public()
    except ValueError as error:
        return {"refused": str(error)}


def act(action: str, request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
    store, identifier = host.store(), request.match_info["id"]
    store.ask(identifier, ACTIONS[action], only=partial(_allowed, action))
    if action == "resume":
        host.work()
    return {"id": identifier, "state": store.job(identifier).state}


def _allowed(action: str, job: Job) -> bool:
    """True; raises ValueError if the job's state does not allow the action."""
    state = job.state
    if action == "resume" and state not in ("paused", "failed", "lost"):
        raise ValueError(f"The job is {state}: only paused or failed jobs can be resumed.")
    if action == "finish" and state != "running":
        raise ValueError(f"The job is {state}: only running jobs can be finished early.")
    if action != "resume" and state in ("done", "failed"):
        raise ValueError(f"The job is {state} already, so it cannot {action}.")
    return True


def delete(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
    host.store().delete(request.match_info["id"])
    return {"id": request.match_info["id"], "state": "deleted"}


def move(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
    before = body.get("before")
    if before is not None and not isinstance(before, str):
        raise ValueError(f"before must be a job's id or null, found {before!r}.")
    host.store().move(request.match_info["id"], before)
    return {"id": request.match_info["id"]}


def lora(request: web.Request) -> dict[str, Any]:
    """What a LoRA file says about itself."""
    return host.lora(request.query.get("name", ""))


def rename(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
    title = body.get("title")
    if not isinstance(title, str) or len(title) > LONGEST_TITLE or not title.isprintable():
        raise ValueError(
            f"title must be one line of at most {LONGEST_TITLE} characters (empty: the LoRA's name "
            f"is shown), found {str(title)[:40]!r}."
        )
    host.store().rename(request.match_info["id"], title.strip())
    return {"id": request.match_info["id"]}


def extend(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
    store, identifier = host.store(), request.match_info["id"]
    store.extend(identifier, _positive(body, "steps"))
    host.work()
    return {"id": identifier, "state": store.job(identifier).state}


def export(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
    return {"lora_name": host.export(request.match_info["id"], _positive(body, "step"))}


def _positive(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_STEPS:
        raise ValueError(f"{name} must be from 1 to {MOST_STEPS}, found {str(value)[:40]!r}.")
    return value


def openapi(request: web.Request) -> Any:
    """openapi.json, completed with the schemas of Order and of its parts."""
    document = json.loads(Path(__file__).with_name("openapi.json").read_text(encoding="utf-8"))
    orders = {kind.__name__: schema(kind) for kind in (Order, DataOrder, TeacherOrder)}
    document["components"]["schemas"] |= orders
    return document


READS: dict[str, Handler] = {
    "jobs": jobs,
    "jobs/{id}": job,
    "jobs/{id}/log": job_log,
    "jobs/{id}/workflow": workflow,
    "jobs/{id}/metrics": metrics,
    "jobs/{id}/samples/{name}": samples,
    "lora": lora,
    "openapi.json": openapi,
}
CHANGES: dict[str, ChangeHandler] = {
    "jobs": create,
    "estimate": estimate,
    "jobs/{id}/delete": delete,
    "jobs/{id}/move": move,
    "jobs/{id}/rename": rename,
    "jobs/{id}/extend": extend,
    "jobs/{id}/export": export,
    **{f"jobs/{{id}}/{action}": partial(act, action) for action in ACTIONS},
}


def _settings(spec: dict[str, Any]) -> dict[str, Any]:
    """The job's settings without the server's paths."""
    hidden = ("host", "host_flags", "checkpoint", "output", "banks", "embeddings", "loras", "data")
    shown = {name: value for name, value in spec.items() if name not in hidden}
    if isinstance(start := shown.pop("start_from", None), str):
        shown["start_from"] = Path(start).name
    if isinstance(vae := shown.pop("vae", None), str):
        shown["vae"] = Path(vae).name
    if isinstance(encoders := shown.pop("text_encoders", None), list):
        shown["text_encoders"] = [Path(str(path)).name for path in encoders]
    data = spec.get("data")
    items = data.items() if isinstance(data, dict) else ()
    return shown | {"data": {name: value for name, value in items if name != "path"}}
