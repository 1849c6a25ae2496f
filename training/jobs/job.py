"""One job, as the files in its folder describe it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .processes import Process
from .records import Attempt, Control, Outline, Status, on_cluster
from .states import activity_of, state_of

WAITING = ("queued", "lost")
WATCHED = tuple(record.FILE for record in (Outline, Control, Attempt, Status))
Stamps = tuple[tuple[int, int], ...]  # time of change in ns and size of each file


class NoJob(KeyError):
    """No job has this id, or it was deleted."""

    def __str__(self) -> str:
        return f"There is no job {self.args[0]}."


@dataclass(frozen=True)
class Job:
    """One job, as its files describe it.

    Attributes:
        state: queued, preparing, running, stopping, paused, done, failed, or lost: its process
            died and the supervisor has not restarted it yet.
        loss: None before the first report. seconds_left: None unless it is running.
        activity: what an active job does at the moment; see states.activity_of.
        activity_done, activity_total: the progress of the activity; see records.ACTIVITIES.
        created, changed: seconds since 1970.
        device, policy, aside, order, key, title: see records.Control.
        visible: the names that the driver has for the job's devices, "" if there is no choice.
    """

    id: str
    name: str
    state: str
    message: str
    step: int
    steps: int
    loss: float | None
    seconds_left: float | None
    created: float
    changed: float
    checkpoint: str
    device: str
    policy: str
    aside: Process | None
    lora_name: str | None
    order: float
    key: str
    error: str | None
    visible: str
    activity: str
    activity_done: int
    activity_total: int
    title: str = ""

    @property
    def on_cluster(self) -> bool:
        """Whether it trains on a cluster and does not use this machine."""
        return on_cluster(self.device)

    @property
    def waits(self) -> bool:
        """Whether it will continue by itself, so that a supervisor must run."""
        return self.state in WAITING or (self.state == "paused" and self.aside is not None)

    @property
    def is_forsaken(self) -> bool:
        """Whether it paused for a server that no longer runs."""
        return self.state == "paused" and self.aside is not None and not self.aside.alive

    def public(self) -> dict[str, Any]:
        """The job as pages show it. `aside`: whether the job will continue by itself."""
        internal = ("order", "key", "visible")
        shown = {name: value for name, value in vars(self).items() if name not in internal}
        return shown | {"aside": bool(self.aside) and self.state in ("paused", "stopping")}

    def progress(self) -> str:
        """A line with state, activity, step, loss, time left and message."""
        parts = [self.state]
        if self.activity not in ("", self.state, "training"):
            parts.append(self.activity)
            if self.activity_total:
                parts[-1] += f" {self.activity_done} of {self.activity_total}"
        if self.step:
            parts.append(f"step {self.step} of {self.steps}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.seconds_left is not None:
            minutes, seconds = divmod(int(self.seconds_left), 60)
            hours, minutes_of_hour = divmod(minutes, 60)
            long, short = f"{hours} h {minutes_of_hour} min left", f"{minutes} min {seconds} s left"
            parts.append(long if hours else short)
        if self.message and not self.activity:
            parts.append(self.message)
        return ", ".join(parts)


def read(path: Path) -> Job:
    """The job in a folder. Torn or missing files lead to a state, not to an exception.

    Raises NoJob if the folder is gone.
    """
    outline = Outline.read(path)
    control = Control.read(path) or Control()
    # Read before the status, because a trainer reports that it is done before its supervisor
    # records that it ended.
    attempt = Attempt.read(path) or Attempt()
    status = Status.read(path) or Status()
    state, message = "failed", "The job's description spec.json is damaged or gone."
    if outline is not None:
        state, message = state_of(control, attempt, status)
    activity, is_own = "", False
    if outline is not None:
        activity = activity_of(control, attempt, status)
        is_own = activity == status.activity
    outline = outline or Outline()
    # If control.json is torn, the name of the LoRA file is the best that is left.
    name = control.name or Path(outline.output or path.name).stem
    changed = max(nanoseconds for nanoseconds, _ in stamps_of(path)) / 1e9
    if not path.is_dir():  # checked last: the job may be deleted while its files are read
        raise NoJob(path.name)
    return Job(
        id=path.name,
        name=name,
        state=state,
        message=message,
        step=status.step,
        steps=outline.steps,
        loss=status.loss,
        seconds_left=status.seconds_left if state == "running" else None,
        created=control.created,
        changed=changed,
        checkpoint=Path(outline.checkpoint).name,
        device=control.device,
        policy=control.policy,
        aside=control.aside,
        lora_name=f"{name}.safetensors" if state == "done" else None,
        order=control.order,
        key=control.key,
        error=message if state == "failed" else None,
        visible=control.device if control.visible is None else control.visible,
        activity=activity,
        activity_done=status.activity_done if is_own else 0,
        activity_total=status.activity_total if is_own else 0,
        title=control.title,
    )


def stamps_of(path: Path, names: tuple[str, ...] = WATCHED) -> Stamps:
    """Change time in ns and size of each named file; zeros if it is missing."""
    stamps = []
    for name in names:
        try:
            stat = os.stat(f"{path}{os.sep}{name}")
            stamps.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            stamps.append((0, 0))
    return tuple(stamps)
