"""Commands for developers: `python3 dev VERB`, and as VERB

    demo | test | serve | bench | gpu | toy | pictures | faults

This file and environment.py need the standard library only: they make the environment that the
rest runs in. Options for every command: --host VERSION (0.30.0, 0.24.1 or 0.16.3), --front-end
VERSION (of comfyui-frontend-package; else the one that the host's own requirements name).
COMFYUI_PATH names a ComfyUI of your own to use instead; LCM_LORA_CACHE moves the cache folder.
"""

import os
import signal
import subprocess
import sys
import types

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed; this is " + sys.version.split()[0] + ".")

HERE = os.path.dirname(os.path.abspath(__file__))
VERBS = ("demo", "test", "serve", "bench", "toy", "pictures", "faults", "gpu")
INSIDE = "LCM_LORA_DEV_HOST"  # set when this runs inside the environment: the host's folder


def as_package():
    """Makes the checkout importable as `lcm_lora` without its __init__, which wants ComfyUI.

    The folder dev/ leaves the import path: its modules must not hide ComfyUI's of the same name.
    """
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
    package = types.ModuleType("lcm_lora")
    package.__path__ = [os.path.dirname(HERE)]
    sys.modules["lcm_lora"] = package


def end_cleanly():
    """Treats SIGTERM and SIGHUP like Ctrl-C, so that no pip and no server is left running."""

    def interrupt(number, _frame):
        signal.signal(number, signal.SIG_IGN)  # a second signal would interrupt the clean-up
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, interrupt)


def main(arguments):
    if not arguments or arguments[0] not in VERBS:
        print(__doc__)
        return 0 if arguments[:1] in ([], ["-h"], ["--help"]) else 2
    as_package()
    end_cleanly()
    if INSIDE in os.environ:
        from lcm_lora.dev import commands

        return commands.run(arguments[0], arguments[1:], os.environ[INSIDE])
    from lcm_lora.dev import environment

    try:
        version, front_end, arguments = environment.chosen(arguments)
        python, host, pages = environment.prepare(version, front_end)
    except (environment.SetupError, OSError) as error:
        print("\nThe set-up failed. %s" % error, file=sys.stderr)
        return 1
    inside = dict(os.environ, **{INSIDE: str(host), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"})
    inside[environment.PAGES] = str(pages or "")
    # Requests to the server on this machine must not go through a proxy.
    inside["no_proxy"] = ",".join(filter(None, ["127.0.0.1", os.environ.get("no_proxy")]))
    child = subprocess.Popen([str(python), HERE, *arguments], env=inside)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while True:
        try:
            status = child.wait()
            return status if status >= 0 else 128 - status  # as a shell reports an end by a signal
        except KeyboardInterrupt:
            continue  # a terminal also interrupts the child, which cleans up


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
