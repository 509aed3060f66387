"""The demo's data: English text that ships with CPython, as windows of characters.

The text is `pydoc_data.topics` (Python's own help pages, about 465,000 characters), so the demo needs no download.
"""

from collections.abc import Iterable
from pydoc_data.topics import topics

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# Fixed: the few non-ASCII characters of the text differ between CPython releases, and a checkpoint written under one
# release must load under another. The last entry represents all characters outside printable ASCII.
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
VOCABULARY = "\n" + "".join(map(chr, range(32, 127))) + UNKNOWN

CHUNK_CHARS = 1000  # the text is split into train and validation by chunks of this many characters
VALIDATION_EVERY = 10  # every tenth chunk, so both parts cover all topics
VALIDATION_WINDOWS = 512  # divides evenly over 1 to 512 ranks when that count is a power of two
TRAIN_STRIDE = 40  # characters between window starts; sets the length of an epoch


def split_runs(n_chars: int) -> tuple[list[range], list[range]]:
    """Positions of the text as (train, validation) ranges: disjoint, in order, and together all of [0, n_chars)."""
    train: list[range] = []
    validation: list[range] = []
    period = CHUNK_CHARS * VALIDATION_EVERY
    for start in range(0, n_chars, period):
        border = min(start + period - CHUNK_CHARS, n_chars)
        train.append(range(start, border))
        if border < n_chars:
            validation.append(range(border, min(start + period, n_chars)))
    return train, validation


class TextWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `block_size` characters; item i is (inputs, targets), int64, each of shape (block_size,).

    Targets are the inputs shifted by one character.
    """

    def __init__(self, ids: Tensor, starts: list[int], block_size: int) -> None:
        self.ids = ids
        self.starts = starts
        self.block_size = block_size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.starts[index]
        stop = start + self.block_size
        return self.ids[start:stop], self.ids[start + 1 : stop + 1]


class DemoText(LightningDataModule):
    """CPython's help pages as windows of characters, split 90/10 by chunks; no window crosses the split.

    Args:
        batch_size: windows per batch on one rank (the micro batch).
        block_size: characters per window; at most CHUNK_CHARS - 1.
        train_stride: characters between the starts of two training windows; windows overlap when below block_size.
    """

    def __init__(self, batch_size: int = 32, block_size: int = 64, train_stride: int = TRAIN_STRIDE) -> None:
        super().__init__()
        if not 1 <= block_size < CHUNK_CHARS:
            raise ValueError(
                f"block_size={block_size}: a window and its next character must fit in one chunk of the split; "
                f"choose 1 to {CHUNK_CHARS - 1}"
            )
        self.batch_size = batch_size
        self.block_size = block_size
        self.train_stride = train_stride
        self.train_windows: TextWindows | None = None
        self.validation_windows: TextWindows | None = None

    @property
    def vocab_size(self) -> int:
        """Number of distinct ids, the same under every CPython release."""
        return len(VOCABULARY)

    def encode(self, text: str) -> Tensor:
        """Characters to ids: int64, shape (len(text),), each in [0, vocab_size)."""
        ids = {char: i for i, char in enumerate(VOCABULARY)}
        return torch.tensor([ids.get(char, ids[UNKNOWN]) for char in text], dtype=torch.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids back to characters; unknown characters become U+FFFD."""
        return "".join(VOCABULARY[i] for i in ids)

    def setup(self, stage: str | None = None) -> None:
        """Encode the text and create the windows, which are the same on every rank."""
        del stage  # all stages use the same text
        if self.train_windows is None:
            self.train_windows, self.validation_windows = self._make_windows()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled batches of (inputs, targets), int64, each of shape (batch_size, block_size)."""
        return DataLoader(self._get_windows()[0], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """VALIDATION_WINDOWS windows in a fixed order, shapes as in training."""
        return DataLoader(self._get_windows()[1], batch_size=self.batch_size, shuffle=False)

    def bigram_loss(self) -> float:
        """Loss in nats per character of an add-one-smoothed bigram model, on the GPT's own validation windows.

        A baseline with one character of context. Pairs are counted over all training text.
        """
        train, validation = self._get_windows()
        size = self.vocab_size
        pairs = torch.zeros(size * size, dtype=torch.float64)
        for run in split_runs(len(train.ids))[0]:
            ids = train.ids[run.start : run.stop]
            pairs += torch.bincount(ids[:-1] * size + ids[1:], minlength=size * size)
        counts = pairs.view(size, size) + 1.0
        log_probs = (counts / counts.sum(dim=1, keepdim=True)).log()
        windows = (validation[i] for i in range(len(validation)))
        losses = [-log_probs[inputs, targets].mean() for inputs, targets in windows]
        return float(torch.stack(losses).mean())

    def _make_windows(self) -> tuple[TextWindows, TextWindows]:
        ids = self.encode("".join(topics[name] for name in sorted(topics)))
        train_runs, validation_runs = split_runs(len(ids))
        train = [s for run in train_runs for s in run[: -self.block_size : self.train_stride]]
        candidates = [s for run in validation_runs for s in run[: -self.block_size]]
        # Evenly spaced over all validation text, so the count holds for any block size.
        validation = [candidates[i * len(candidates) // VALIDATION_WINDOWS] for i in range(VALIDATION_WINDOWS)]
        return TextWindows(ids, train, self.block_size), TextWindows(ids, validation, self.block_size)

    def _get_windows(self) -> tuple[TextWindows, TextWindows]:
        if self.train_windows is None or self.validation_windows is None:
            raise RuntimeError("DemoText has no windows yet: call setup() first (the Trainer calls it)")
        return self.train_windows, self.validation_windows
