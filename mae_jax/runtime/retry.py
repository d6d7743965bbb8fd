"""Retries for reads, since most faults of disks and networks are transient."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

PAUSES = (0.05, 0.15, 0.4, 1.4)  # seconds before each retry
LASTING = frozenset(
    {
        errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
        errno.EINVAL, errno.EBADMSG, errno.ENXIO, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP,
    }
)  # fmt: skip

T = TypeVar("T")


def with_patience(read: Callable[[], T]) -> T:
    """The value of `read()`, retried after a transient OSError (EIO, ESTALE, ETIMEDOUT, ...), but not a LASTING one."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno in LASTING:
                raise
        time.sleep(pause)
    return read()
