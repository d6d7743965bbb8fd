"""Memory and time of the k-NN search: `python -m benchmarks.knn_memory [--train=1281167] [--test=1000] ...`.

The defaults are ImageNet's training set and a ViT-B's features. Prints the peak resident memory of the process, the
features among it.
"""

import argparse
import resource
import time

import jax
import ml_collections
import numpy as np

from mae_jax.evaluation.features import find_neighbours
from mae_jax.runtime.mesh import make_mesh

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=1_281_167, help="training features")
    parser.add_argument("--test", type=int, default=1000, help="queries")
    parser.add_argument("--width", type=int, default=768, help="length of a feature")
    parser.add_argument("--k", type=int, default=20, help="neighbours")
    args = parser.parse_args()

    mesh = make_mesh(ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1)))
    rng = np.random.default_rng(0)
    train, test = (rng.standard_normal((count, args.width), dtype=np.float32) for count in (args.train, args.test))
    before = peak_memory()
    start = time.perf_counter()
    find_neighbours(train, test, args.k, mesh)
    seconds = time.perf_counter() - start
    print(f"{args.train:,} x {args.width} training features, {args.test:,} queries, k {args.k}, {len(jax.devices())} "
          f"{jax.devices()[0].device_kind} device(s)")  # fmt: skip
    print(f"features {(train.nbytes + test.nbytes) / GIB:.2f} GiB; peak resident memory {peak_memory() / GIB:.2f} GiB, "
          f"{before / GIB:.2f} before the search")  # fmt: skip
    print(f"{seconds:.1f} s with compiling, {1000 * seconds / args.test:.1f} s for 1,000 queries")


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
