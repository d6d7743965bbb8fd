"""Memory that was freed is kept for the next step."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from mae_jax.runtime.allocator import keep_freed_memory

# Page faults of arrays that are made, filled and freed once more, when all has settled: glibc before 2.38 asks for some
# bytes more than it gives out where memory must be aligned, as XLA's must, and so may find what was freed too small
# several times, until the small pieces beside it are free as well.
PROGRAM = """
import resource, statistics
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp, numpy as np
from ml_collections import ConfigDict
from mae_jax.runtime.allocator import keep_freed_memory
from mae_jax.runtime.mesh import prepare_cpu

def fill(*mebibytes):
    [np.ones(size << 20, np.uint8) for size in mebibytes]

if {keeps}:
    assert keep_freed_memory()
    prepare_cpu(ConfigDict(dict(cpu_devices=1)))
{before}
faults = []
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    {run}
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[8:])))
"""
CASES = {
    "first thread": ("", "fill(96)"),
    # Each takes most of a heap of this thread's.
    "another thread": ("thread = ThreadPoolExecutor(1)", "thread.submit(fill, 48, 48).result()"),
    "compiled": ("program = jax.jit(lambda x: x[:, None] + x); x = jnp.ones(5017)", "program(x).block_until_ready()"),
}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
@pytest.mark.parametrize("case", CASES)
def test_memory_that_was_freed_is_found_again_without_a_fault(case):
    def count(keeps):
        before, run = CASES[case]
        program = PROGRAM.format(keeps=keeps, before=before, run=run)
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        return int(done.stdout)

    pages = (96 << 20) // 4096
    assert count(True) < pages / 100  # a thread's own stack and such
    assert count(False) > pages / 600  # also if the kernel gives pages of 2 MiB


def test_where_the_c_library_has_no_such_setting_nothing_is_done(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
