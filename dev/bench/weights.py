"""Grids of Compare Settings on the demo model: their time against bare pictures and a queue."""

from __future__ import annotations

import argparse
from pathlib import Path

import comfy

from . import grids
from .report import Report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each subject")


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    report = Report("weights")
    grids.add(report, chosen.runs, checkpoint, Path(comfy.__path__[0]).parent)
    return report
