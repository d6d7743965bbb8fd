"""ArrayRecord files as TFDS and `array_record` open them, with their errors as the loader knows errors."""

import errno
import os
import pickle
from collections.abc import Callable
from typing import Any


class Records:
    """Records in random access files, which threads share and pickled copies open again."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, read: Callable[[Any], Any]) -> Any:
        """read(the records), reopened after an error. Raises OSError: ArrayRecord's, or EBADMSG for damage."""
        try:
            return read(self._records)
        except RuntimeError as error:
            self._records = pickle.loads(pickle.dumps(self._records))  # without the open files
            what = str(error).split("; ")[0]
            named = (code for code in errno.errorcode if what.endswith(f"() failed: {os.strerror(code)}"))
            raise OSError(next(named, errno.EBADMSG), what) from error
