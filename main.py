"""Starts a run: python main.py --config=configs/NAME.py[:ARGUMENT] [--workdir=DIR] [--config.KEY=VALUE ...]

Exit codes: 0 done; 1 the run failed; 2 a mistake in the command, the settings or the data; 143 stopped by SIGTERM,
with everything saved. Several processes all end with the code of the first one that failed or was stopped.
"""

import gc
import os
import sys
import time

BEGAN = time.perf_counter()  # before the imports, which take much of a start
gc.set_threshold(50_000, 20, 50)  # imports and tracing make millions of lasting objects: scanning them took 0.8 s
while os.open(os.devnull, os.O_RDWR) <= 2:  # otherwise the next opened file would get a closed output's descriptor
    pass

import errno
import functools
import logging
import shlex
import tempfile
from pathlib import Path

try:
    import jax
except ValueError as error:  # an environment variable that jax reads
    os.write(2, b"error: %s; unset it or fix it\n" % str(error).encode("unicode_escape"))
    sys.exit(2)
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from configs import common
from mae_jax.runtime import processes
from mae_jax.runtime.console import keep_streams, say
from mae_jax.runtime.errors import NotSaved, UserError, out_of_memory
from mae_jax.runtime.mesh import prepare_cpu
from mae_jax.runtime.platform import keep_freed_memory
from mae_jax.runtime.signals import SharedStopSignal, Stopped, StopSignal
from mae_jax.runtime.timing import Startup, use_compilation_cache
from mae_jax.settings import command_line
from mae_jax.settings.checks import check_agreement, expand_paths
from mae_jax.settings.fields import use_defaults
from mae_jax.tasks import check_task, trains
from mae_jax.training.loop import NonFiniteLoss
from mae_jax.workdir.folder import LOCK, check_folder, locked
from mae_jax.workdir.metrics import check_writers

use_defaults(common.get_config)
CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # disk errors that a user can fix
WORKDIR = flags.DEFINE_string("workdir", None, "folder of everything that the run writes; default: runs/NAME")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if the launcher does not provide it")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "number of processes, with --coordinator")
PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "which of them this one is, from 0")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "only compile the step and print its cost (ablations: list the runs)")
TOPOLOGY = flags.DEFINE_string("topology", None, "with --dry_run: compile for other devices: h100:8, v5p:4x4x4, cpu:64")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake in it ends the program with one line and exit code 2."""
    if command_line.asks_for_help(argv[1:]):
        help = (__doc__, flags.FLAGS.main_module_help(), command_line.describe_configs(argv[1:]))
        say(*"\n".join(help).split("\n"))
        sys.exit(0)
    try:
        command_line.check_command_line(argv[1:])
        return flags.FLAGS(argv)
    except UserError as error:
        processes.fail(error, 2)
    except flags.UnrecognizedFlagError as error:
        processes.fail(command_line.describe_unknown_flag(error.flagname, argv[1:]), 2)
    except (flags.Error, TypeError, ValueError) as error:  # a value of the wrong type
        processes.fail(str(error).splitlines()[0], 2)


def main(argv: list[str], startup: Startup) -> None:
    absl_logging.set_verbosity(absl_logging.FATAL)  # libraries also raise what they log as errors
    logging.getLogger("mae_jax").setLevel(logging.WARNING)
    keep_freed_memory()
    use_compilation_cache()
    saves = trains(CONFIG.value.task)
    try:
        prepare_cpu(CONFIG.value.mesh)
        place = COORDINATOR.value, PROCESS_COUNT.value, PROCESS_INDEX.value
        if CONFIG.value.task == "ablate" and processes.find_place(*place, os.environ):
            remedy = "to share its runs among hosts start it once on each, with --config.shard=0/N to N-1/N"
            raise UserError(f"an ablation is one process, which starts one for each of its runs; {remedy}")
        if CONFIG.value.task != "ablate" and not DRY_RUN.value:
            processes.start(*place, saves=saves)
    except UserError as error:
        processes.fail(error, 2)
    shared = saves and processes.process_count() > 1
    with SharedStopSignal() if shared else StopSignal() as stop:
        try:
            run(argv, stop, startup)
            jax.distributed.shutdown()  # waits until all processes have finished
        except UserError as error:
            processes.fail(error, 2)
        except (NonFiniteLoss, NotSaved) as error:
            processes.fail(error, 1)
        except Stopped:
            stop.leave()
        except BaseException as error:
            if message := out_of_memory(error, trains=saves):
                processes.fail(message, 1)
            if processes.process_count() > 1:
                processes.fail(error, 1, unexpected=True)
            raise


def run(argv: list[str], stop: StopSignal, startup: Startup) -> None:
    """Runs the task of the config, or its dry run."""
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; settings are given as --config.KEY=VALUE")
    config = CONFIG.value
    config.given = command_line.given_settings(sys.argv[1:])
    with startup.phase("imports"):
        task = check_task(config)
    check_writers(config.logging.writers)
    expand_paths(config)
    path, argument = command_line.config_file(sys.argv[1:])
    arguments = [argument] if argument else []
    workdir = Path(WORKDIR.value or "_".join([f"runs/{path.stem}", *arguments])).expanduser()
    if config.task == "ablate":
        config.file = ":".join([str(path.absolute()), *arguments])
        plan = task.make_plan(config, workdir)  # before a folder is made: it may raise UserError
    else:
        config.ablate = common.get_config().ablate  # one run of an ablation is a run like any other

    if DRY_RUN.value and config.task == "ablate":
        return say(*(shlex.join(task.full_command(run)) for run in plan.own))
    if DRY_RUN.value and trains(config.task):
        return say(*task.dry_run(config, TOPOLOGY.value))
    if DRY_RUN.value or TOPOLOGY.value is not None:
        given = f"--dry_run={DRY_RUN.value} --topology={TOPOLOGY.value} with config.task={config.task}"
        raise UserError(f"{given}: --dry_run needs a task that trains, and --topology needs --dry_run")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}; choose another folder") from error
    check_folder(workdir, config.task)
    check_agreement(config, workdir)
    with locked(workdir, task.lock_name(config) if config.task == "ablate" else LOCK):
        try:
            task.run(config, workdir, stop, *([startup] if trains(config.task) else []))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise NotSaved(
                f"{error.filename or workdir} cannot be written: {error.strerror}; free space there; then the same "
                "command resumes the run"
            ) from error


if __name__ == "__main__":
    keep_streams()
    app.run(functools.partial(main, startup=Startup(BEGAN)), flags_parser=parse_flags)
