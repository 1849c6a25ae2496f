"""Talks to a ComfyUI server: HTTP for requests, its WebSocket for progress."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import aiohttp

Progress = Callable[[float, int], None]
"""(nodes done, with the running one's share; nodes in all)"""


class PromptError(RuntimeError):
    """The server refused a prompt or a node failed; `node` is the node's id where it is known."""

    def __init__(self, message: str, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node


class Client:
    """output: the server's output folder, which this machine shares."""

    def __init__(self, url: str, output: Path) -> None:
        self.url, self.output, self.id = url, output, uuid.uuid4().hex

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=120) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict):
        """The JSON answer, or None where there is none. HTTP errors raise PromptError."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise _refusal(error.read().decode(errors="replace")) from error
        return json.loads(text) if text else None

    def run(self, prompt: dict, on_progress: Progress = lambda done, total: None) -> dict:
        """Runs an API prompt to its end; -> node id -> what the node showed.

        Raises PromptError with the node's own message when it is refused or fails.
        """
        return asyncio.run(self._run(prompt, on_progress))

    def pictures(self, shown: dict) -> dict[str, list[Path]]:
        """Node id -> the picture files it saved or previewed, of what `run` gave."""
        folders = {"output": self.output, "temp": self.output.with_name("temp")}
        return {
            node: [
                folders[image["type"]] / image["subfolder"] / image["filename"]
                for image in ui["images"]
            ]
            for node, ui in shown.items()
            if "images" in ui
        }

    async def _run(self, prompt: dict, on_progress: Progress) -> dict:
        async with aiohttp.ClientSession() as session:
            socket = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.id}"
            async with session.ws_connect(socket, max_msg_size=0) as messages:
                # Connected first, so that no message of the run is missed.
                queued = await asyncio.to_thread(
                    self.post, "/prompt", {"prompt": prompt, "client_id": self.id}
                )
                await self._follow(messages, queued["prompt_id"], len(prompt), on_progress)
        history = await asyncio.to_thread(self.get, f"/history/{queued['prompt_id']}")
        return history[queued["prompt_id"]]["outputs"]

    async def _follow(self, messages, prompt_id: str, total: int, on_progress: Progress) -> None:
        done: set[str] = set()
        running: str | None = None
        async for message in messages:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # a preview picture
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "execution_cached":
                done |= set(data["nodes"])
            elif kind == "executing" and data["node"] is None:
                # Sent after the history is written, unlike execution_success.
                on_progress(total, total)
                return
            elif kind == "executing":
                done |= {running} - {None}
                running = data["node"]
            elif kind == "progress":
                on_progress(len(done) + data["value"] / max(data["max"], 1), total)
                continue
            elif kind == "execution_error":
                raise PromptError(
                    f"{data['node_type']} (node {data['node_id']}): {data['exception_message']}",
                    data["node_id"],
                )
            elif kind == "execution_interrupted":
                raise PromptError("The run was interrupted.", data.get("node_id"))
            on_progress(len(done), total)
        raise PromptError("The server closed the connection before the run was done.")


def _refusal(text: str) -> PromptError:
    """The server's answer to a refused prompt, as one sentence for each node."""
    try:
        answer = json.loads(text)
        lines = [answer["error"]["message"]]
        nodes = answer.get("node_errors") or {}
        for node, problems in nodes.items():
            for error in problems["errors"]:
                where = f"{problems['class_type']} (node {node})"
                lines.append(f"{where}: {error['message']}: {error['details']}")
    except (ValueError, KeyError, TypeError):
        return PromptError(text[:500])
    return PromptError("\n".join(lines), next(iter(nodes), None))
