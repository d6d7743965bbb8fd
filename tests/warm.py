"""Runs main.py in forks of one process that has imported what main.py imports: half the time of a short run.

A line on standard input is one run: its arguments, and the files for its standard output and error. The answer, a line
on standard output, is its exit code.
"""

import gc
import json
import os
import runpy
import signal
import sys

# Nothing here may start JAX's devices: their threads do not survive a fork.
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import sklearn.datasets  # noqa: F401
import sklearn.model_selection  # noqa: F401
import tensorboardX  # noqa: F401

import mae_jax.settings.command_line
import mae_jax.tasks.evaluate
import mae_jax.tasks.export
import mae_jax.tasks.frozen
import mae_jax.training.loop  # noqa: F401


def fork(arguments: list[str], out: str, err: str) -> int | None:
    """Returns the exit code of a run in the parent, and None in the child, which is to make it."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for descriptor, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["main.py", *arguments]
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    while line := sys.stdin.readline():
        code = fork(**json.loads(line))
        if code is None:
            break
        print(code, flush=True)
    if line:
        runpy.run_path("main.py", run_name="__main__")
