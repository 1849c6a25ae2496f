"""The program of a training process: `python training/run.py SPEC.json`, alone or under torchrun.

The job's folder is the one that holds SPEC.json. Exit status: 0 done or paused, 1 failed, 75 paused
because the disk is full.
"""

from __future__ import annotations

import argparse
import logging
import sys
import types
from contextlib import nullcontext, suppress
from pathlib import Path

log = logging.getLogger("lcm_lora")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    parser.add_argument("spec", type=Path, nargs="?")
    parser.add_argument("--supervise", type=Path, metavar="JOBS", help="run a queue of jobs")
    parser.add_argument("--ray", type=Path, metavar="SETTINGS", help="train on a Ray cluster")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    options = parser.parse_args(arguments)
    _register_package()
    date = None if options.supervise else "%H:%M:%S"
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt=date)
    log.setLevel(logging.INFO)
    if options.supervise:
        from lcm_lora.training.jobs import supervisor

        return supervisor.main(options.supervise)
    if options.spec is None:
        parser.error("name the job's spec.json")
    if options.ray:
        from lcm_lora.training.cluster import follower

        return follower.main(options.spec, options.ray)
    return train(options.spec, options.dry_run)


def train(description: Path, dry_run: bool) -> int:
    """Runs this process's part of a job and writes its end to the job's status; -> exit status.

    Raises errors that the user cannot fix, such as a fault of the device. The status then has
    `crash`, and the supervisor starts the job again.
    """
    from lcm_lora.training import disk, spec
    from lcm_lora.training.memory import TooLittleMemory
    from lcm_lora.training.ranks import Ranks
    from lcm_lora.training.state.journal import Journal
    from lcm_lora.training.waiting import Paused, Request

    job = description.resolve().parent
    if not job.is_dir():
        log.error("There is no job description %s.", description)
        return 1
    # Read before it is checked, because only the first process reports what is wrong with it.
    flags = disk.read_object(description).get("host_flags")
    ranks = Ranks.join(isinstance(flags, list) and "--cpu" in flags)
    journal = Journal(job) if ranks.first and not dry_run else None
    try:
        # Here, because a package that this machine lacks is an error that the job has to report.
        from lcm_lora.training.pipeline import Pipeline

        request = Request(job / "control.json")
        with journal.beating() if journal is not None else nullcontext():
            Pipeline(spec.read(description), job, ranks, journal, request).run(dry_run)
        return 0
    except Paused as paused:
        # torchrun ends the other processes only if one fails; some would wait for this one.
        status = int(ranks.world > 1)
        state, message = "paused", str(paused)
    except (ValueError, TooLittleMemory) as error:
        state, message, status = "failed", str(error), 1
    except Exception as error:
        if not (isinstance(error, OSError) and disk.disk_is_full(error)):
            if journal is not None:
                with suppress(OSError):
                    message = f"{type(error).__name__}: {error}"
                    journal.state("failed", message=message, crash=True)
            raise
        state, status = "paused", disk.DISK_FULL
        message = (
            f"The disk is full ({error}). Nothing is lost: free some space and start the job "
            "again. It continues from its newest checkpoint."
        )
    finally:
        ranks.leave()
    log.log(logging.ERROR if status else logging.INFO, "%s", message)
    if journal is not None:
        try:
            journal.state(state, message=message, disk_full=status == disk.DISK_FULL)
        except OSError as error:  # the disk has no room for the state; the exit status says it too
            log.error("the state could not be written: %s", error)
    return status


def _register_package() -> None:
    """Registers the pack as the package `lcm_lora`, whatever the name of its folder.

    This file's folder leaves the import path, where its file names would hide other modules.
    """
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    package = types.ModuleType("lcm_lora")
    package.__path__ = [str(here.parent)]
    sys.modules.setdefault("lcm_lora", package)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
