"""The state of a job, and what follows when its process has ended: two tables over its records."""

from __future__ import annotations

import time
from dataclasses import replace

from .. import disk
from .records import Attempt, Control, Status

ACTIVE = ("preparing", "running", "stopping")
CRASHES = 3  # in a row without a new step; one more and the job has failed
PAUSES = (1.0, 10.0, 60.0)  # seconds before a restart, by the number of crashes


def state_of(control: Control, attempt: Attempt, status: Status) -> tuple[str, str]:
    """(state, message). The first row that fits counts:

    process   asked to end   reported             ended in this turn   state
    alive     yes                                                      stopping
    alive                    nothing yet                               preparing
    alive                    preparing, running                        as reported
    alive                    anything else                             stopping
    none                     done                                      done
    none                                          failed               failed
    none      yes                                                      paused
    none                                          paused               paused
    none                     (end not seen by the supervisor yet)      lost
    none                                                               queued
    """
    if attempt.alive:
        reported = attempt.own(status)
        if control.action:
            return "stopping", status.message
        if not reported.state:
            return "preparing", ""
        is_at_work = reported.state in ("preparing", "running")
        return reported.state if is_at_work else "stopping", reported.message
    if status.state == "done":
        return "done", status.message
    # "Resume" begins a turn in which nothing has ended yet.
    ended = attempt.ended if attempt.turn == control.turn else None
    reason = attempt.message or status.message
    if ended == "failed":
        return "failed", reason
    if control.action:
        return "paused", "paused while the graph runs" if control.aside else status.message
    if ended == "paused":
        return "paused", reason
    if attempt.pid and attempt.ended is None:
        return "lost", "The process died unexpectedly."
    return "queued", ""


def restart_or_end(control: Control, attempt: Attempt, status: Status, code: int | None) -> Attempt:
    """The attempt with how it ended. No other code decides whether a job is started again:

    done       the trainer reported it
    failed     the trainer reported a fault that would return, as in the settings (no `crash`)
    paused     it was asked to end, or the disk is full; it waits for "resume"
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
        attempt, ended="crashed", crashes=crashes, step=report.step, not_before=time.time() + pause
    )
