"""The Jobs REST API of a Ray cluster (docs.ray.io, "Ray Jobs REST API"), without Ray itself."""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping

from .settings import HELP, Cluster

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
TIMEOUT = 60.0  # seconds


class NoAnswer(OSError):
    """The cluster cannot be reached, or it has an internal error. The caller asks again later."""


class Api:
    """One cluster's API. Calls raise NoAnswer, and ValueError if the cluster refuses a request."""

    def __init__(self, cluster: Cluster):
        self.address, self.token = cluster.address.rstrip("/"), cluster.token

    def state(self, submission: str) -> tuple[str, str]:
        """(PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, "" for an unknown submission; Ray's
        message about it)."""
        answer = self._call("GET", f"jobs/{submission}")
        if answer is None:
            return "", ""
        content = json.loads(answer)
        return content["status"], content.get("message") or ""

    def submit(
        self, submission: str, entrypoint: str, environment: Mapping[str, str], package: bytes
    ) -> None:
        """Uploads the package (a zip file) and starts the entry point in it."""
        if self.state(submission)[0]:
            return  # submitted before, but the answer was lost
        name = f"_ray_pkg_{hashlib.sha256(package).hexdigest()[:16]}.zip"
        if self._call("GET", f"packages/gcs/{name}") is None:
            self._call("PUT", f"packages/gcs/{name}", package)
        order = {
            "submission_id": submission,
            "entrypoint": entrypoint,
            "runtime_env": {"working_dir": f"gcs://{name}", "env_vars": dict(environment)},
        }
        if self._call("POST", "jobs/", json.dumps(order).encode()) is None:
            raise ValueError(f"{self.address} answers, but does not accept Ray jobs. {HELP}")

    def stop(self, submission: str) -> None:
        self._call("POST", f"jobs/{submission}/stop", b"")

    def log(self, submission: str) -> str:
        answer = self._call("GET", f"jobs/{submission}/logs")
        return json.loads(answer or "{}").get("logs") or ""

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes | None:
        """The body of the answer; None for 404, except after PUT."""
        request = urllib.request.Request(f"{self.address}/api/{path}", body, method=method)
        request.add_header("Content-Type", "application/json")
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404 and method != "PUT":
                return None
            reason = f"{error}. {error.read(2000).decode('utf-8', 'replace')}".strip()
            if error.code >= 500:
                raise NoAnswer(reason) from None
            raise ValueError(f"The cluster refuses: {reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(str(getattr(error, "reason", error))) from None
