"""Kills at random moments of everything that works on a job, through a real server."""

import json
import os
import random
import shutil
import time

import pytest
from lcm_lora.tests.tally import half_files, orphans, same

VICTIMS = [
    ("trainer",), ("supervisor",), ("server",), ("trainer", "supervisor"),
    ("trainer", "supervisor", "server"),
]  # fmt: skip


@pytest.mark.faults
def test_kills_at_random_moments_cost_nothing(ground, tally):
    """Jobs are killed again and again, until each kind of kill was tried often enough."""
    chance, undisturbed = random.Random(1), ground.order("whole")
    assert ground.done(undisturbed)
    expected = ground.loras / "whole.safetensors"
    folders = ground.loras, ground.store.folder, ground.store.folder.parent / "banks"
    tried = dict.fromkeys(VICTIMS, 0)
    while min(tried.values()) < tally.times:
        name = f"killed {sum(tried.values())}"
        job, suffered = ground.order(name), []
        while min(tried.values()) < tally.times:
            if ground.done(job, chance.uniform(0, 12)):
                break
            ground.spared(job)
            victims = min(tried, key=tried.get)
            for victim in victims:
                ground.kill(victim, job)
            tried[victims] += 1
            suffered.append((victims, half_files(*folders, working=True)))
            if "server" in victims:
                ground.up()
        done = ground.done(job)
        left = orphans(ground.store, job), half_files(*folders)
        lost = not done or not same(ground.loras / f"{name}.safetensors", expected)
        for victims, torn in suffered:
            tally.add("kill " + ", ".join(victims), int(lost), left[0], left[1] + torn)


@pytest.mark.faults
def test_two_servers_of_one_user_folder_share_one_queue(ground, tally):
    first = ground.server
    one = ground.order("one")
    ground.up()
    two = ground.order("two")
    try:
        done = [ground.done(job) for job in (one, two)]
        lost = sum(not finished for finished in done)
        lost += not same(ground.loras / "one.safetensors", ground.loras / "two.safetensors")
        tally.add(
            "two servers on one user folder", lost,
            orphans(ground.store, one) + orphans(ground.store, two),
            half_files(ground.loras, ground.store.folder),
        )  # fmt: skip
    finally:
        first.stop()


@pytest.mark.faults
def test_fifty_jobs_in_the_queue_are_all_done(ground, tally):
    jobs = [ground.order(f"many/{i:02d}", steps=1, sample_every=0) for i in range(50)]
    for job in jobs:
        lost = not ground.done(job, 1500)
        tally.add("50 jobs queued", int(lost), orphans(ground.store, job), 0)
    assert len(list((ground.loras / "many").glob("*.safetensors"))) == 50
    ended = [ground.store.job(job).changed for job in jobs]
    assert ended == sorted(ended), "they were not taken in their order"
    assert not half_files(ground.loras, ground.store.folder)


@pytest.mark.faults
def test_a_name_that_is_taken_meanwhile_and_a_checkpoint_that_is_gone(ground, tally):
    taken = ground.order("taken")
    checkpoint = ground.base / "models" / "checkpoints" / "passing.safetensors"
    shutil.copyfile(checkpoint.parent / ground.subject.checkpoint, checkpoint)
    gone = ground.order("gone", checkpoint=checkpoint.name)
    next_one = ground.order("next")
    file = ground.loras / "taken.safetensors"
    file.write_bytes(b"mine")
    checkpoint.unlink()
    ended = ground.done(next_one)
    for job, fault, says in (
        (taken, "output name taken meanwhile", "exists already"),
        (gone, "checkpoint deleted while queued", "no checkpoint"),
    ):
        record = ground.store.job(job)
        reported = record.state == "failed" and says in (record.error or "")
        tally.add(fault, int(not ended or not reported), orphans(ground.store, job), 0)
    assert file.read_bytes() == b"mine"


@pytest.mark.faults
def test_after_a_power_cut_stale_numbers_of_processes_mean_nothing(ground, tally):
    """Everything is gone, its pids belong to others, and the clock was set back."""
    for _ in range(min(3, tally.times)):
        name = f"cut {tally.tried('reboot')}"
        job = ground.order(name)
        ground.done(job, 10)
        for victim in ("server", "supervisor", "trainer"):
            ground.kill(victim, job)
        for file in (
            ground.store.path(job) / "supervisor.json", ground.store.folder / ".supervisor.json"
        ):  # fmt: skip
            record = json.loads(file.read_text()) if file.exists() else {}
            later = time.time() + 1e6
            file.write_text(json.dumps(record | {"pid": os.getpid(), "not_before": later}))
            os.utime(file, (later, later))
        ground.up()
        lost = not ground.done(job)
        tally.add(
            "reboot", int(lost), orphans(ground.store, job),
            half_files(ground.loras, ground.store.folder),
        )  # fmt: skip
