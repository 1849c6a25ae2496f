"""The state of a job, as a table over its records."""

from __future__ import annotations

from .records import Attempt, Control, Status

ACTIVE = ("preparing", "running", "stopping")
REQUESTED = {
    "pause": ("pausing", "pausing after this step"),
    "stop": ("stopping", "stopping after this step"),
    "finish": ("finishing", "finishing after this step"),
}
"""The activity of a job that follows a request: alone, and as several processes within a step."""


def state_of(control: Control, attempt: Attempt, status: Status) -> tuple[str, str]:
    """(state, message). The first row that fits counts:

    process   end requested  reported             ended in this turn   state
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
            return "stopping", activity_of(control, attempt, status)
        if not reported.state:
            return "preparing", ""
        is_at_work = reported.state in ("preparing", "running")
        return reported.state if is_at_work else "stopping", reported.message
    if status.state == "done":
        return "done", status.message
    # "Resume" begins a new turn, in which no attempt has ended yet.
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


def activity_of(control: Control, attempt: Attempt, status: Status) -> str:
    """What the job is doing at the moment, more exactly than its state; "" if it is not active."""
    if not attempt.alive:
        return ""
    reported = attempt.own(status)
    if control.action in REQUESTED:
        within_a_step = control.processes > 1 and reported.activity == "training"
        return REQUESTED[control.action][within_a_step]
    if not reported.state:
        return "starting"
    return reported.activity if reported.state in ("preparing", "running") else "ending"
