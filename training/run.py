"""What a training process starts: `python training/run.py SPEC.json`, alone or under torchrun.

The job's folder is the one that holds SPEC.json. Exit status: 0 done or paused, 1 failed, 75 paused
because the disk is full.
"""

from __future__ import annotations

import argparse
import errno
import getpass
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISK_FULL = 75
PATIENCE = 60.0  # seconds to wait for memory
LISTED = 1000  # unused files that the log names
NICE = 10  # a job on the processor leaves it to the prompts
_held: list = []  # locks of the devices
log = logging.getLogger("lcm_lora")


def disk_is_full(error: OSError) -> bool:
    """Told by its number, or by the words of a library that hides it (Windows has 112)."""
    words = r"No space left|quota exceeded|os error (28|112)\b"
    numbers = errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)  # Windows has no quota's number
    return error.errno in numbers or bool(re.search(words, str(error)))


class Paused(Exception):
    """The job was asked to end before its training began; what the bank has is kept."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    parser.add_argument("spec", type=Path, nargs="?")
    parser.add_argument("--supervise", type=Path, metavar="JOBS", help="run a queue of jobs")
    parser.add_argument("--ray", type=Path, metavar="SETTINGS", help="train on a Ray cluster")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    chosen = parser.parse_args(arguments)
    _as_package()
    if chosen.supervise:
        from lcm_lora.training.jobs import supervisor

        logging.basicConfig(format="%(asctime)s %(message)s")
        log.setLevel(logging.INFO)
        return supervisor.main(chosen.supervise)
    if chosen.spec is None:
        parser.error("name the job's spec.json")
    if chosen.ray:
        from lcm_lora.training.cluster import follower

        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        log.setLevel(logging.INFO)
        return follower.main(chosen.spec, chosen.ray)
    from lcm_lora.training import disk
    from lcm_lora.training.memory import TooLittleMemory
    from lcm_lora.training.ranks import Ranks
    from lcm_lora.training.state.journal import Journal

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    job = chosen.spec.resolve().parent
    if not job.is_dir():
        log.error("There is no job description %s.", chosen.spec)
        return 1
    # Before the description is checked, for what is wrong in it only the first process tells.
    flags = disk.read_object(chosen.spec).get("host_flags")
    ranks = Ranks.join(isinstance(flags, list) and "--cpu" in flags)
    journal = Journal(job) if ranks.first and not chosen.dry_run else None
    try:
        return _job(chosen.spec, job, ranks, journal, chosen.dry_run)
    except Paused as paused:
        # A launcher of several ranks ends them all when one fails; else some would wait for it.
        status = int(ranks.world > 1)
        state, message = "paused", str(paused)
    except (ValueError, TooLittleMemory) as error:
        state, message, status = "failed", str(error), 1
    except Exception as error:
        if not (isinstance(error, OSError) and disk_is_full(error)):
            # A fault of ours, of a device or of the disk, or another process of the job is no more:
            # the state tells it too, the traceback goes to the log, and the supervisor tries again.
            if journal is not None:
                with suppress(OSError):
                    message = f"{type(error).__name__}: {error}"
                    journal.state("failed", message=message, crash=True)
            raise
        state, status = "paused", DISK_FULL
        message = (
            f"The disk is full ({error}). Nothing is lost: make room and start the job again, it "
            "goes on after its newest checkpoint."
        )
    finally:
        ranks.leave()
    log.log(logging.ERROR if status else logging.INFO, "%s", message)
    if journal is not None:
        try:
            journal.state(state, message=message, disk_full=status == DISK_FULL)
        except OSError as error:  # not even the state fits on the disk; the exit status tells it
            log.error("the state could not be written: %s", error)
    return status


def _as_package() -> None:
    """Registers the pack as a package whatever its folder is called.

    This folder leaves the import path, where its file names would hide other modules.
    """
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [each for each in sys.path if str(Path(each).resolve()) != here]
    package = types.ModuleType("lcm_lora")
    package.__path__ = [str(ROOT)]
    sys.modules.setdefault("lcm_lora", package)


def _job(spec_file: Path, job: Path, ranks, journal, dry_run: bool) -> int:
    from filelock import FileLock, Timeout
    from lcm_lora.training import disk, result
    from lcm_lora.training.jobs.processes import MARK
    from lcm_lora.training.memory import keep_freed
    from lcm_lora.training.spec import read
    from lcm_lora.training.teacher import Teacher, enter, free_memory

    spec = read(spec_file)
    asked = _Asked(job / "control.json")
    output, banks = Path(spec.output), Path(spec.banks)
    if result.finished(job, output):
        if journal is not None:
            journal.state("done", message=f"{output.name} is ready")
        log.info("%s is done already", output.name)
        return 0
    if output.exists() and not spec.overwrite and not result.interrupted(job, output):
        raise ValueError(f"{output.name} exists already: choose another name, or allow overwrite.")
    banks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(banks / f"{disk.name_of(str(output))}.lock")
    try:
        if ranks.first:
            lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another job is writing {output.name} now: choose another name."
        ) from None
    try:
        if journal is not None:
            journal.state("preparing", message="", steps=spec.steps)
            if MARK in os.environ:
                _wait_for_device(journal, asked)
        ranks.wait()
        keep_freed()
        enter(Path(spec.host), spec.host_flags)
        _wait_for_memory(Path(spec.checkpoint), free_memory, journal, asked)
        teacher = Teacher.load(Path(spec.checkpoint), spec.precision, spec.loras, spec.embeddings)
        if MARK in os.environ and teacher.device.type == "cpu" and hasattr(os, "nice"):
            os.nice(NICE)
        return _distil(spec, job, teacher, ranks, journal, asked, dry_run)
    finally:
        lock.release()


def _wait_for_device(journal, asked) -> None:
    """Jobs of one user train one at a time on a device, whichever ComfyUI they belong to; a program
    that was started by hand does not wait. The locks end with the process."""
    from filelock import FileLock, Timeout

    for device in sorted(set((os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(","))):
        # A container's user may have no name.
        user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
        name = f"lcm_lora-{user}-{device}.lock"
        _held.append(FileLock(Path(tempfile.gettempdir()) / name))
        while True:
            try:
                _held[-1].acquire(timeout=1)
                break
            except Timeout:
                message = "waits for another ComfyUI's job on this device"
                journal.state("preparing", message=message)
            if asked():
                raise Paused("paused before the training began")


def _wait_for_memory(checkpoint: Path, free: Callable[[], int], journal, asked) -> None:
    """Until the device has room for the checkpoint, which the server was asked to make; for a while
    only, for the host may get along with less."""
    needed = checkpoint.stat().st_size if checkpoint.is_file() else 0
    until = time.monotonic() + PATIENCE
    while (left := free()) < needed and time.monotonic() < until:
        if asked():
            raise Paused("paused before the training began")
        if journal is not None:
            journal.state(
                "preparing",
                message=f"waits for {needed / 1e9:.1f} GB of memory, {left / 1e9:.1f} are free",
            )
        time.sleep(1)


def _distil(spec, job: Path, teacher, ranks, journal, asked, dry_run: bool) -> int:
    import torch
    from lcm_lora.training import disk, export, result
    from lcm_lora.training.adapter import Adapter
    from lcm_lora.training.data import bank, sources
    from lcm_lora.training.data.answers import FOLDER as ANSWERS
    from lcm_lora.training.data.captioned import summary
    from lcm_lora.training.plan import plan
    from lcm_lora.training.state.loop import Run
    from lcm_lora.training.state.samples import Samples

    source = sources.source(spec, teacher)
    for name, reason in source.unused[:LISTED] if ranks.first else ():
        log.warning("not used: %s: %s", name, reason)
    if ranks.first and len(source.unused) > LISTED:
        log.warning("not used: %d more", len(source.unused) - LISTED)
    adapter = Adapter(teacher.network, spec.rank, spec.lora_alpha, spec.seed)
    if dry_run:
        print(plan(spec, teacher, adapter, len(source)))  # noqa: T201 (the plan is asked for)
        return 0
    needed = 12 * sum(p.numel() for p in adapter.parameters()) * (spec.keep + 2)
    if spec.passes > 1:
        needed += 4 * len(source) * teacher.channels * (spec.resolution // 8) ** 2
    _room(job, needed - _bytes(job / "checkpoints", job / ANSWERS), "checkpoints")
    samples = None
    if ranks.first and spec.sample_every:
        prompts = spec.sample_prompts or tuple(dict.fromkeys(source.captions()))[:4]
        samples = Samples(job, teacher, prompts, spec.resolution, spec.seed, spec.objective)
    paths = [Path(path) for path in (spec.checkpoint, *(lora.path for lora in spec.loras))]
    for path in paths if ranks.first else ():
        result.file_hash(path, Path(spec.banks))
    ranks.wait()  # the others read what the first has remembered
    base_hash, *styles = [result.file_hash(path, Path(spec.banks)) for path in paths]
    strengths = [lora.strength for lora in spec.loras]
    told = source.settings() | {"loras": list(zip(styles, strengths, strict=True))}
    if any("embedding:" in caption for caption in source.captions()):
        told["embeddings"] = disk.stamps([Path(path) for path in spec.embeddings])
    folder = Path(spec.banks) / bank.key(base_hash, told)

    if is_new := not (folder / bank.INDEX).exists():
        needed = _bank_bytes(spec, teacher, source) - _bytes(folder)
        _room(Path(spec.banks), needed, "the latent bank")
    shown, reached = [0.0], ["before the training began"]
    unused = summary(source.unused)

    def between() -> None:
        # Each process looks for itself, and none waits for another's answer: all read the same
        # file, and a launcher ends those that are left when one ends.
        if asked() == "pause":
            raise Paused(f"paused {reached[0]}")

    def progress(what: str, done: int, of: int) -> None:
        reached[0] = f"at {what}: {done} of {of}"
        now = time.monotonic()
        if journal is not None and (now - shown[0] > 2 or done in (0, of)):
            shown[0] = now
            journal.state("preparing", message=_with(f"{what}: {done} of {of}", unused))
            log.info("bank, %s: %d of %d", what, done, of)

    try:
        with adapter.off():
            bank.build(
                folder, source, teacher.text, spec.data.skip_limit, ranks, progress,
                teacher.free_text_encoders, between,
            )  # fmt: skip
    except RuntimeError:
        # One that has drawn its part and waits loses the connection when another is paused.
        if ranks.world > 1:
            between()
        raise
    teacher.free_text_encoders()
    teacher.free_vae()
    torch.manual_seed(spec.seed)
    rows = bank.Bank(folder)
    for reason in rows.skipped if ranks.first and not is_new else ():
        log.warning("skipped: %s", reason)
    run = Run(spec, job, teacher, adapter, rows, ranks, journal, samples, asked)
    if journal is not None:
        begins = f"{len(rows)} examples in the bank"
        journal.state("preparing", message=_with(begins, unused, _skipped(rows.skipped)))
    outcome = run.train()
    if outcome == "pause":
        if journal is not None:
            journal.state("paused", step=run.step, message=f"paused after step {run.step}")
        log.info("paused after step %d", run.step)
        return 0
    if ranks.first:
        about = result.about(spec, teacher, run.step, base_hash, folder.name)
        made = export.vector(adapter.state(), adapter.alpha, about, Path(spec.output).stem)
        made = export.with_styles(made, teacher.styles)
        result.write(job, Path(spec.output), made, teacher.untaken)
        shutil.rmtree(job / ANSWERS, ignore_errors=True)
        ready = f"{Path(spec.output).name} is ready"
        message = _with(ready, unused, _skipped(rows.skipped))
        journal.state("done", step=run.step, message=message)
    ranks.wait()
    return 0


def _with(message: str, *notes: str) -> str:
    """A message with the sentences that are to be read with it, as far as there are any."""
    return ". ".join([message, *(note.removesuffix(".") for note in notes if note)])


def _skipped(reasons: list[str]) -> str:
    """A sentence about the examples that are missing from the bank; "" if none are."""
    if not reasons:
        return ""
    first = [reason.removesuffix(".") for reason in dict.fromkeys(reasons)][:3]
    return f"Unreadable: {len(reasons)} of the examples, the first: {'; '.join(first)}"


def _room(folder: Path, needed: float, what: str) -> None:
    """Raises OSError (ENOSPC) where the disk has not the bytes that will be needed."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed for {what}, {free / 1e9:.1f} are free"
        )


def _bytes(*folders: Path) -> int:
    """What is there already, of a run that goes on."""
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


def _bank_bytes(spec, teacher, source) -> int:
    """What the whole bank takes: half precision latents, and each text once."""
    latents = len(source) * teacher.channels * (spec.resolution // 8) ** 2
    a_text = sum(tensor.numel() for tensor in teacher.uncond.values())
    return 2 * (latents + a_text * len(set(source.captions())))


class _Asked:
    """What the job is asked: by its control file, or by a signal, which means pause."""

    def __init__(self, control: Path):
        self.control, self.signalled = control, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signal)

    def _signal(self, *_) -> None:
        self.signalled = True

    def __call__(self) -> str:
        from lcm_lora.training import disk

        if self.signalled:
            return "pause"
        action = disk.read_object(self.control).get("action")
        # "stop" is a pause too, which the supervisor enforces where it is not followed.
        return {"pause": "pause", "stop": "pause", "finish": "finish"}.get(action, "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
