"""The data's randomness as a pure function of counters, so that a resumed run sees the batches it would have seen."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

CROPS, ORDER = 0, 1  # streams: the same seed and counter give unrelated numbers in each


def generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    """numpy's counter-based generator; nothing is carried from one counter to the next."""
    return np.random.Generator(np.random.Philox(key=[seed, counter], counter=[0, 0, 0, stream]))


@lru_cache(maxsize=4)
def order(num_items: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, ORDER, epoch).permutation(num_items)


class StepSampler(Sampler[list[int]]):
    """Yields the batches of steps start, start + 1, ..., stop - 1.

    The items are walked through in a new order each epoch; a batch may span two epochs, so that no item is dropped and
    any batch size serves any dataset.
    """

    def __init__(self, num_items: int, batch_size: int, *, seed: int, start: int = 0, stop: int):
        if num_items < 1:
            raise ValueError(f"num_items must be at least 1, got {num_items}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.num_items, self.batch_size, self.seed, self.start, self.stop = num_items, batch_size, seed, start, stop

    def batch(self, step: int) -> list[int]:
        """Items of one step: a pure function of num_items, batch_size, seed and step."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        epochs_and_rests = (divmod(place, self.num_items) for place in places)
        return [int(order(self.num_items, self.seed, epoch)[rest]) for epoch, rest in epochs_and_rests]

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, range(self.start, self.stop))

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)
