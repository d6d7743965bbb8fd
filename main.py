"""Starts a run: python main.py --config=configs/NAME.py [--workdir=DIR] [--config.KEY=VALUE ...]

Exit codes: 0 done; 1 the run failed; 2 a mistake in the command, the settings or the data; 143 stopped by SIGTERM,
with everything saved.
"""

import errno
import os
import sys
import tempfile
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from mae_jax.config import check, check_command_line, config_path, expand_paths, given_settings
from mae_jax.errors import NotSaved, UserError
from mae_jax.lock import locked
from mae_jax.tasks import TRAINED, find_task
from mae_jax.training.loop import NonFiniteLoss
from mae_jax.training.signals import Stopped, StopSignal

CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a user can mend of what a disk says
WORKDIR = flags.DEFINE_string("workdir", None, "folder of everything that the run writes; default: runs/NAME")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; mistakes in it end the program with one line and exit code 2."""
    try:
        if not {"--help", "-h", "-help", "--helpfull"} & set(argv):
            check_command_line(argv[1:])
        return flags.FLAGS(argv)
    except UserError as error:
        fail(error, 2)
    except (flags.Error, TypeError, ValueError) as error:  # a value of the wrong type
        fail(str(error).splitlines()[0], 2)


def main(argv: list[str]) -> None:
    with StopSignal() as stop:
        try:
            if argv[1:]:
                raise UserError(f"unexpected argument {argv[1]!r}; settings are given as --config.KEY=VALUE")
            config = CONFIG.value
            task = find_task(config.task)
            if config.task not in TRAINED:
                config.given = given_settings(sys.argv[1:])
            check(config)
            expand_paths(config)
            workdir = create_workdir(WORKDIR.value or f"runs/{config_path(sys.argv[1:]).stem}")
            logging.set_verbosity(logging.WARNING)  # the libraries' own chatter stays out of the run's lines
            with locked(workdir):
                task.run(config, workdir, stop)
        except UserError as error:
            fail(error, 2)
        except (NonFiniteLoss, NotSaved) as error:
            fail(error, 1)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            fail(f"{error.filename or workdir} cannot be written: {error.strerror}; free space there", 1)
        except Stopped:
            # Everything is saved and closed. Not sys.exit: a signal in the middle of a compilation leaves objects
            # behind on which the interpreter's own way out crashes.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.exit_code())


def create_workdir(name: str) -> Path:
    path = Path(name).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--workdir={name} cannot be written: {error.strerror}; choose another folder") from error
    return path


def fail(message: object, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
