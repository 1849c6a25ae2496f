"""The rule that restarts crashed jobs."""

from __future__ import annotations

import time
from dataclasses import replace

from .. import disk
from .records import Attempt, Control, Status

CRASHES = 3  # crashes in a row without a new step that are allowed; one more and the job fails
PAUSES = (1.0, 10.0, 60.0)  # seconds before a restart, by the number of crashes


def restart_or_end(control: Control, attempt: Attempt, status: Status, code: int | None) -> Attempt:
    """The attempt with `ended` set. Only this function decides whether a job starts again:

    done       the trainer reported it
    failed     the trainer reported a fault that would return, such as a wrong setting (no `crash`)
    paused     a request ended it, or the disk is full; it waits for "resume"
    crashed    anything else: it is queued again, and starts after a pause
    failed     more than CRASHES crashes in a row without a new step

    code: the exit status of the process, None if it is unknown.
    """
    report = attempt.own(status)
    if report.state == "done" or (report.state == "failed" and not report.crash):
        return replace(attempt, ended=report.state, message=report.message)
    if control.action or code == disk.DISK_FULL or report.disk_full:
        return replace(attempt, ended="paused", message=report.message)
    crashes = 1 if report.step > attempt.step else attempt.crashes + 1
    if crashes > CRASHES:
        reason = f": {report.message.removesuffix('.')}." if report.crash else "."
        message = (
            f"The training crashed {crashes} times in a row at step {report.step}{reason} "
            "See the log for details."
        )
        return replace(attempt, ended="failed", message=message)
    pause = PAUSES[min(crashes, len(PAUSES)) - 1]
    return replace(
        attempt, ended="crashed", crashes=crashes, step=max(report.step, attempt.step),
        not_before=time.time() + pause,
    )  # fmt: skip
