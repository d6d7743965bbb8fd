"""A part of a source."""

import numpy as np

from mae_jax.data.sources import Source


class RandomSubset:
    """`count` examples of a source, the same random ones each time, in the source's order; all if it has no more."""

    def __init__(self, source: Source, count: int, seed: int = 0):
        self._source = source
        chosen = np.random.default_rng(seed).permutation(len(source))[:count]
        self._indices = np.sort(chosen)
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.in_memory = getattr(source, "in_memory", False)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[int(self._indices[index])]

    def name_of(self, index: int) -> str:
        return self._source.name_of(int(self._indices[index]))
