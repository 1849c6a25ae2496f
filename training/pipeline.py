"""A job from its description to the LoRA file, in named steps that each of its processes runs."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from . import disk, export, result, waiting
from .adapter import Adapter
from .data import answers, bank, sources
from .data.captioned import summary
from .device_lock import wait_for_device
from .gradient_check import require_right_gradients
from .host import enter, free_memory, load_teacher
from .jobs.processes import MARK
from .memory import keep_freed
from .objectives.table import family_of
from .plan import plan
from .ranks import Ranks
from .spec import Spec
from .start import start_from
from .state import checkpoints
from .state.journal import Journal
from .state.likeness import Likeness
from .state.loop import Run
from .state.samples import Samples
from .teacher import FLOW, Teacher

log = logging.getLogger("lcm_lora")
LISTED = 1000  # unused files that the log names
NICE = 10  # a job that trains on the CPU leaves it to the prompts


@dataclass
class Pipeline:
    """One process's part of a job. journal: set in the first process, None in the others."""

    spec: Spec
    job: Path
    ranks: Ranks
    journal: Journal | None
    request: waiting.Request

    def run(self, dry_run: bool = False) -> None:
        """Distils and writes the LoRA, or continues where an earlier process ended.

        dry_run: prints the plan instead. Raises Paused, ValueError if the user must change
        something, and OSError if the disk fails.
        """
        output = Path(self.spec.output)
        if result.finished(self.job, output):
            self.report("done", "")
            log.info("%s was written by an earlier run", output.name)
            return
        with self.reserved_output():
            self.report("preparing", "", steps=self.spec.steps)
            teacher = self.load_teacher()
            source = self.read_data(teacher)
            adapter = Adapter(
                teacher.network, self.spec.rank, self.spec.lora_alpha, self.spec.seed,
                teacher.targets, teacher.device,
            )  # fmt: skip
            if self.spec.start_from:
                start_from(adapter, teacher, Path(self.spec.start_from))
            if teacher.prediction == FLOW:
                require_right_gradients(teacher, adapter)
            if dry_run:
                teacher.free_text_encoders()  # as after the bank: they take no room in a step
                teacher.free_vae()
                print(plan(self.spec, teacher, adapter, len(source)))  # noqa: T201 (asked for)
                return
            self.require_room_for_checkpoints(teacher, source, adapter)
            samples = self.choose_samples(teacher, source)
            base_hash, style_hashes = self.hash_inputs()
            rows = self.build_bank(teacher, source, adapter, base_hash, style_hashes)
            notes = summary(source.unused), _unreadable(rows.skipped)
            run = self.train(teacher, adapter, rows, samples, notes)
            if run is not None:
                self.write_result(run, base_hash, notes)

    @contextmanager
    def reserved_output(self) -> Iterator[None]:
        """Inside the block, no other job can write to this job's output file.

        Raises ValueError if the file exists already or another job is writing it.
        """
        output, banks = Path(self.spec.output), Path(self.spec.banks)
        replaces = self.spec.overwrite or result.interrupted(self.job, output)
        if output.exists() and not replaces:
            raise ValueError(
                f"{output.name} exists already: choose another name, or switch overwrite on."
            )
        banks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(banks / f"{disk.name_of(str(output))}.lock")
        try:
            if self.ranks.first:
                lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another job is writing {output.name} now: choose another name."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def load_teacher(self) -> Teacher:
        """Waits for the device and its memory, then loads the checkpoint."""
        from_queue = MARK in os.environ  # a job that the user starts by hand does not wait
        if self.journal is not None and from_queue:
            wait_for_device(self.journal, self.request)
        self.ranks.wait()
        keep_freed()
        spec = self.spec
        enter(Path(spec.host), spec.host_flags)
        checkpoint = Path(spec.checkpoint)
        waiting.for_memory(checkpoint, free_memory, self.journal, self.request)
        self.report("preparing", "", "loading the checkpoint")
        teacher = load_teacher(
            checkpoint, spec.precision, spec.loras, spec.embeddings,
            tuple(map(Path, spec.text_encoders)), Path(spec.vae) if spec.vae else None,
            spec.offloads,
        )  # fmt: skip
        teacher.use_guidance(spec.guidance)
        if from_queue and teacher.device.type == "cpu" and hasattr(os, "nice"):
            os.nice(NICE)
        return teacher

    def read_data(self, teacher: Teacher) -> sources.Source:
        """Finds the prompts or pictures, and logs those that the job does not use."""
        source = sources.source(self.spec, teacher)
        if self.ranks.first:
            for name, reason in source.unused[:LISTED]:
                log.warning("not used: %s: %s", name, reason)
            if len(source.unused) > LISTED:
                log.warning("not used: %d more", len(source.unused) - LISTED)
        return source

    def require_room_for_checkpoints(
        self, teacher: Teacher, source: sources.Source, adapter: Adapter
    ) -> None:
        spec = self.spec
        parameters = sum(parameter.numel() for parameter in adapter.parameters())
        needed = checkpoints.room(parameters, spec.keep, spec.objective)
        if spec.passes > 1:  # the teacher's outputs are kept, in float32
            needed += 4 * len(source) * teacher.latent_shape(spec.resolution).numel()
        written = _bytes_in(self.job / "checkpoints", self.job / answers.FOLDER)
        waiting.require_room(self.job, needed - written, "the checkpoints")

    def choose_samples(self, teacher: Teacher, source: sources.Source) -> Samples | None:
        """The run's sample pictures, for the job's own prompts or its first captions."""
        spec = self.spec
        if not (self.ranks.first and spec.sample_every):
            return None
        prompts = spec.sample_prompts or tuple(dict.fromkeys(source.captions()))[:4]
        return Samples(self.job, teacher, prompts, spec.resolution, spec.seed, family_of(spec))

    def hash_inputs(self) -> tuple[str, list[str]]:
        """The sha256 of the checkpoint, and of each style LoRA."""
        spec = self.spec
        paths = [Path(path) for path in (spec.checkpoint, *(lora.path for lora in spec.loras))]
        base_hash, *style_hashes = self.hashes(paths)
        return base_hash, style_hashes

    def hashes(self, paths: list[Path]) -> list[str]:
        """The sha256 of files."""
        cache = Path(self.spec.banks)
        if self.ranks.first:
            for path in paths:
                result.file_hash(path, cache)
        self.ranks.wait()  # the other processes read the hashes that the first has written
        return [result.file_hash(path, cache) for path in paths]

    def build_bank(
        self, teacher: Teacher, source: sources.Source, adapter: Adapter,
        base_hash: str, style_hashes: list[str],
    ) -> bank.Bank:  # fmt: skip
        """The finished latent bank; an earlier job's if it fits."""
        spec, banks = self.spec, Path(self.spec.banks)
        strengths = [lora.strength for lora in spec.loras]
        settings = source.settings() | {"loras": list(zip(style_hashes, strengths, strict=True))}
        if parts := [Path(path) for path in (*spec.text_encoders, spec.vae) if path]:
            settings["parts"] = self.hashes(parts)
        if any("embedding:" in caption for caption in source.captions()):
            settings["embeddings"] = disk.stamps([Path(path) for path in spec.embeddings])
        if teacher.prediction == FLOW:
            settings["texts"] = "as ComfyUI's conditions"  # earlier banks have two of them
            settings["times"] = teacher.schedule.T
        folder = banks / bank.key(base_hash, settings)
        is_new = not (folder / bank.INDEX).exists()
        if is_new:
            needed = bank.size(source, teacher.latent_shape(spec.resolution), teacher.text)
            waiting.require_room(banks, needed - _bytes_in(folder), "the latent bank")
        progress = _BankProgress(self, summary(source.unused))
        try:
            with adapter.off():
                bank.build(
                    folder, source, teacher.text, spec.data.skip_limit, self.ranks, progress,
                    teacher.free_text_encoders, progress.end_if_asked,
                )  # fmt: skip
        except RuntimeError:
            # A process that waits for the others loses the connection if one of them is paused.
            if self.ranks.world > 1:
                progress.end_if_asked()
            raise
        teacher.free_text_encoders()
        teacher.free_vae()
        rows = bank.Bank(folder)
        if self.ranks.first and not is_new:
            for reason in rows.skipped:
                log.warning("skipped: %s", reason)
        return rows

    def train(
        self, teacher: Teacher, adapter: Adapter, rows: bank.Bank, samples: Samples | None,
        notes: tuple[str, ...],
    ) -> Run | None:  # fmt: skip
        """Trains to the end; None if the job was paused."""
        if samples is not None:
            samples.likeness = self.likeness(teacher, rows)
        run = Run(
            self.spec, self.job, teacher, adapter, rows, self.ranks, self.journal, samples,
            self.request,
        )  # fmt: skip
        self.report("preparing", with_notes(f"{len(rows)} examples in the bank", *notes))
        if run.train() == "pause":
            self.report("paused", f"paused after step {run.step}", step=run.step)
            log.info("paused after step %d", run.step)
            return None
        return run

    def likeness(self, teacher: Teacher, rows: bank.Bank) -> Likeness | None:
        try:
            return Likeness(teacher, rows, family_of(self.spec), self.spec.seed)
        except ValueError as reason:
            log.info("the job compares sample pictures with the teacher's only: %s", reason)
            return None

    def write_result(self, run: Run, base_hash: str, notes: tuple[str, ...]) -> None:
        """The first process writes the LoRA file; the others wait for it."""
        if self.ranks.first:
            spec, teacher, adapter = self.spec, run.teacher, run.adapter
            output = Path(spec.output)
            self.report("running", "", "writing the LoRA", step=run.step)
            metadata = result.metadata(spec, teacher, run.step, base_hash, run.bank.folder.name)
            trained = export.vector(adapter.state(), adapter.alpha, metadata, output.stem)
            vector = export.with_styles(trained, teacher.styles)
            result.write(self.job, output, vector, teacher.unmatched)
            shutil.rmtree(self.job / answers.FOLDER, ignore_errors=True)
            self.report("done", with_notes(*notes), step=run.step)
        self.ranks.wait()

    def report(self, state: str, message: str, activity: str = "", **figures: int) -> None:
        if self.journal is not None:
            self.journal.state(state, activity, message=message, **figures)


class _BankProgress:
    """Reports the progress of the bank, at most every two seconds."""

    def __init__(self, pipeline: Pipeline, unused: str):
        self.pipeline, self.unused = pipeline, unused
        self.reported_at = 0.0
        self.reached = "before the training began"

    def __call__(self, kind: str, done: int, total: int) -> None:
        count = f"{kind}: {done} of {total}"
        self.reached = f"at {count}"
        now = time.monotonic()
        if self.pipeline.journal is None or not (now - self.reported_at > 2 or done in (0, total)):
            return
        self.reported_at = now
        activity = "encoding captions" if kind == "texts" else "making latents"
        figures = {"activity_done": done, "activity_total": total}
        self.pipeline.report("preparing", with_notes(count, self.unused), activity, **figures)
        log.info("bank, %s", count)

    def end_if_asked(self) -> None:
        # Each process reads the control file itself and does not wait for the others, because
        # torchrun ends the other processes when one ends.
        self.pipeline.request.end_if_asked(self.reached)


def with_notes(*notes: str) -> str:
    """The notes that are not empty, as sentences."""
    return ". ".join(note.removesuffix(".") for note in notes if note)


def _unreadable(reasons: list[str]) -> str:
    """A sentence about the examples that are missing from the bank; "" if there are none."""
    if not reasons:
        return ""
    first = [reason.removesuffix(".") for reason in dict.fromkeys(reasons)][:3]
    return f"Unreadable: {len(reasons)} of the examples, the first: {'; '.join(first)}"


def _bytes_in(*folders: Path) -> int:
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)
