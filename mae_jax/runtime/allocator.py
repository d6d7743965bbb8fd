"""How the C library's allocator deals with the memory of large arrays."""

import ctypes

# mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_LARGEST_HEAP = 64 << 20  # bytes; of a thread other than the first (HEAP_MAX_SIZE in glibc's malloc/arena.c)


def keep_freed_memory() -> bool:
    """Lets glibc keep memory that was freed, and give it out again, instead of handing it back to the system.

    On a CPU, each training step takes gigabytes for activations and frees them. By default every such array is mapped
    anew, and the kernel has to find and clear each of its pages in every step, which costs a fifth to half of its time.
    Threads keep heaps of their own, so that they do not wait for one another; what is larger than such a heap is kept
    in the first thread alone, where steps on a CPU take their memory therefore (`mesh.prepare_cpu`). glibc before 2.38
    may find what a step freed some bytes too small, as it asks for more than aligned memory needs: then the first few
    steps take theirs anew, until it does fit.

    Returns:
      Whether it did; False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    # A heap of a thread goes back when it is empty, unless less than _TOP_PAD would then be left to the thread.
    never = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _LARGEST_HEAP))
    return all([mallopt(option, value) == 1 for option, value in never])
