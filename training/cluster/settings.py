"""The user's Ray cluster: where it is, and the folder that it shares with this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from .. import disk
from ..schema import build, setting

HELP = (
    'It is a JSON file: {"address": "http://head:8265", "storage": "/folder/that/all/see", '
    '"host": "/ComfyUI/on/the/cluster"}, with "token", "storage_there", "gpus" and "cpus" where '
    "they are needed."
)


@dataclass(frozen=True)
class Cluster:
    """The settings, from a file that no page and no workflow can read."""

    FILE: ClassVar[str] = "ray.json"  # beside the folder of jobs
    address: str = setting("The URL of Ray's dashboard.")
    storage: str = setting("The path of the shared folder on this machine.")
    host: str = setting(
        "ComfyUI's folder on the cluster, whose Python needs ComfyUI's requirements.", is_path=True
    )
    storage_there: str = setting("The shared folder's path on the cluster, if it differs.", "")
    token: str = setting("For a cluster that requires one.", "")
    gpus: float = setting("GPUs of each worker; with 0 the workers train on the CPU.", 1.0)
    cpus: float = setting("CPUs of each worker.", 1.0)

    @classmethod
    def read(cls, file: Path) -> Cluster:
        """Raises ValueError if the file is missing or a setting in it is wrong."""
        content = disk.read_json(file)
        if content is None:
            raise ValueError(f"The cluster's settings {file} are missing or not JSON. {HELP}")
        cluster = build(cls, content, file.name)
        if not cluster.address.startswith(("http://", "https://")):
            raise ValueError(
                f"address must begin with http:// or https://, found {cluster.address!r}. {HELP}"
            )
        if not Path(cluster.storage).is_dir():
            raise ValueError(f"storage must be an existing folder, found {cluster.storage!r}.")
        return cluster

    def there(self, path: Path) -> str:
        """The cluster's name for a path inside the storage."""
        if not self.storage_there:
            return str(path)
        return str(PurePosixPath(self.storage_there, *path.relative_to(self.storage).parts))
