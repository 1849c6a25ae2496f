"""Chromium for the tests of the page: the machine's own, or Debian's package."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess

# True in the page when the front end and our nodes have loaded.
READY = """() => window.app?.vueAppReady && window.app.extensionManager
    && !document.querySelector('.p-blockui-mask')
    && window.LiteGraph?.registered_node_types?.['LCMDistill']"""
log = logging.getLogger("lcm_lora")
PACKAGES = ("chromium", "fonts-dejavu-core", "fonts-wqy-microhei")  # the last for Korean too


def chromium() -> str | None:
    """Path of the program; None if it does not exist and this user may not install it."""
    if program := _program():
        return program
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return None
    log.info("Installing Debian's %s for the tests of the page ...", PACKAGES[0])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    alone = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], install):
        if subprocess.run(command, env=alone, **quiet).returncode:
            log.info("%s failed.", " ".join(command))
    return _program()


def _program() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
