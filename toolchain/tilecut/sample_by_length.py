"""`LengthBucketSampler`: batches of examples of like length, so that little of a padded batch is padding.

    sampler = LengthBucketSampler(lengths, batch_size=32)
    loader = DataLoader(examples, batch_sampler=sampler, collate_fn=pad_to_longest)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in loader: ...

The examples are shuffled, cut into windows, sorted by length within each window, cut into batches, and the batches are
shuffled. All of it follows from `seed` and the epoch: every process computes the same list and takes its share of it.
Every index comes exactly once an epoch among all processes, unless `drop_last` says otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from tilecut_runtime.errors import ConfigError, InputError

# Batches that are sorted together, where the caller names no window.
WINDOW_BATCHES = 50


class LengthBucketSampler(Sampler[list[int]]):
    """A batch sampler over examples of the given lengths.

    Args:
        lengths: tokens of every example, at least 1.
        batch_size: examples in a batch; or instead
        max_tokens: tokens in a batch at most: its examples times the longest, or the sum with `packed`.
        packed: the batches are packed, not padded.
        shuffle: False keeps the order but for the sorting within windows.
        seed: of the shuffling, with the epoch that `set_epoch` names.
        drop_last: leave out a batch that is smaller than `batch_size`, and the batches that do not divide among the
            processes. Otherwise some batches are halved until they divide: every process makes as many steps.
        window: examples that are sorted together; None: about 50 batches. With `drop_last` whole batches.
        rank, world_size: which share of the batches, of how many. Leave them where accelerate shares the batches.

    Raises:
        InputError: lengths that are no lengths, or above `max_tokens`.
        ConfigError: options that cannot be honoured.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int | None = None,
        max_tokens: int | None = None,
        *,
        packed: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        window: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        where = "LengthBucketSampler"
        try:
            self.lengths = [operator.index(n) for n in lengths]
        except TypeError as e:
            raise InputError(where, f"lengths are no list of integers ({e})") from e
        if not self.lengths:
            raise InputError(where, "there are no lengths")
        if min(self.lengths) < 1:
            index = next(i for i, n in enumerate(self.lengths) if n < 1)
            raise InputError(where, f"example {index} has no tokens", got=self.lengths[index], wanted="at least 1")
        if (batch_size is None) == (max_tokens is None):
            raise ConfigError(where, "give either batch_size or max_tokens", got=f"{batch_size} and {max_tokens}")
        given = {"batch_size": batch_size, "max_tokens": max_tokens, "window": window, "world_size": world_size}
        for name, value in {**given, "seed": seed, "rank": rank}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(where, f"{name} is no integer", got=repr(value))
            if value is not None and value < 1 and name in given:
                raise ConfigError(where, f"{name} is not positive", got=value)
        if not 0 <= rank < world_size:
            raise ConfigError(where, "no such rank", got=rank, wanted=f"0 to {world_size - 1}")
        longest = max(self.lengths)
        if max_tokens is not None and longest > max_tokens:
            index = self.lengths.index(longest)
            raise InputError(
                where, f"example {index} is longer than max_tokens", got=longest, wanted=f"at most {max_tokens}"
            )
        self.batch_size, self.max_tokens, self.packed = batch_size, max_tokens, packed
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.window = self._default_window() if window is None else window
        if drop_last and batch_size is not None:
            # Whole batches in every window but the last: else each would drop some.
            self.window = max(batch_size, self.window // batch_size * batch_size)
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._made: tuple[int, list[list[int]]] | None = None
        # What does not divide is said here rather than in the loop.
        self._share()

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as this epoch does; without it every epoch is the same."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(batch) for batch in self._share()])

    def __len__(self) -> int:
        return len(self._share())

    def _share(self) -> list[list[int]]:
        """The batches of this process in this epoch."""
        if self._made is None or self._made[0] != self.epoch:
            self._made = (self.epoch, self._batches()[self.rank :: self.world_size])
        return self._made[1]

    def _batches(self) -> list[list[int]]:
        """The batches of all processes."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        count = len(self.lengths)
        order = torch.randperm(count, generator=generator).tolist() if self.shuffle else list(range(count))
        batches = []
        for start in range(0, count, self.window):
            batches += self._cut(sorted(order[start : start + self.window], key=self.lengths.__getitem__))
        if self.drop_last and self.batch_size is not None:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return self._even(batches)

    def _cut(self, ranked: list[int]) -> list[list[int]]:
        """One window, sorted by length, as batches."""
        if self.batch_size is not None:
            return [ranked[i : i + self.batch_size] for i in range(0, len(ranked), self.batch_size)]
        assert self.max_tokens is not None
        batches: list[list[int]] = []
        tokens = 0
        for i in ranked:
            # Sorted: the new one is the longest.
            size = (
                tokens + self.lengths[i] if self.packed else self.lengths[i] * (len(batches[-1]) + 1 if batches else 1)
            )
            if not batches or size > self.max_tokens:
                batches.append([])
                tokens = 0
            batches[-1].append(i)
            tokens += self.lengths[i]
        return batches

    def _even(self, batches: list[list[int]]) -> list[list[int]]:
        """As many batches as divide among the processes."""
        over = len(batches) % self.world_size
        if self.drop_last:
            return batches[: len(batches) - over]
        while len(batches) % self.world_size:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            whole = batches[largest]
            if len(whole) == 1:
                raise InputError(
                    "LengthBucketSampler",
                    "batches of one example do not divide among the processes",
                    got=f"{len(batches)} for {self.world_size}",
                    fix="pass drop_last=True",
                )
            batches[largest] = whole[: len(whole) // 2]
            batches.append(whole[len(whole) // 2 :])
        return batches

    def _default_window(self) -> int:
        if self.batch_size is not None:
            return WINDOW_BATCHES * self.batch_size
        assert self.max_tokens is not None
        return WINDOW_BATCHES * max(1, self.max_tokens * len(self.lengths) // sum(self.lengths))
