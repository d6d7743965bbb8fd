"""How the C library's allocator deals with the memory of large arrays."""

import ctypes

# mallopt(3)
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets glibc keep memory that was freed, and give it out again, instead of handing it back to the system.

    On a CPU, each training step takes gigabytes for activations and frees them. By default every such array is mapped
    anew, and the kernel has to find and clear each of its pages in every step, which costs a fifth to half of its time.
    Call it before JAX starts its threads: later ones have a heap of their own, which cannot hold large arrays.

    Returns:
      Whether it did; False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    never = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
    return all([mallopt(option, value) == 1 for option, value in never])
