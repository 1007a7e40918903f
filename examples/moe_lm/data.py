"""Text that is on every machine: the sources of the running Python's standard library, as bytes.

The same Python version gives the same bytes everywhere. Files, not lines, are held out, so that no half of a
function is known from training.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

VOCABULARY = 256
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}  # others' text, tests, tables


class Corpus(NamedTuple):
    train: np.ndarray  # u8[num_train_bytes]
    held_out: np.ndarray  # u8[num_held_out_bytes]
    num_files: int


def gather(max_bytes: int = 6_000_000, held_out_every: int = 10) -> Corpus:
    """Reads source files in an order given by the hash of their names until the budget is spent."""
    library = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(library) for path in library.rglob("*.py")]
    names = [name for name in names if not LEFT_OUT & set(name.parts)]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    left = max_bytes
    num_files = 0
    for name in names:
        if left <= 0:
            break
        source = (library / name).read_bytes()[:left]
        splits[num_files % held_out_every == 0].append(source)
        left -= len(source)
        num_files += 1
    train, held_out = (np.frombuffer(b"\n".join(split), np.uint8) for split in splits)
    return Corpus(train, held_out, num_files)


def sample_batch(text: np.ndarray, *, batch: int, seq: int, seed: int, step: int) -> np.ndarray:
    """s32[batch, seq + 1] at random places: the same on every process for the same seed and step."""
    starts = np.random.default_rng((seed, step)).integers(0, text.size - seq, size=batch)
    return windows(text, starts, seq)


def spread_batch(text: np.ndarray, *, batch: int, seq: int) -> np.ndarray:
    """s32[batch, seq + 1], evenly spread over the text: the fixed windows to evaluate on."""
    return windows(text, np.linspace(0, text.size - seq - 1, batch).astype(np.int64), seq)


def windows(text: np.ndarray, starts: np.ndarray, seq: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(seq + 1)].astype(np.int32)


def unigram_bits(train: np.ndarray, tokens: np.ndarray) -> float:
    """Bits a byte of tokens[:, 1:] cost when only the frequencies of the training bytes are known."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1.0
    return float(-np.log2(counts / counts.sum())[tokens[:, 1:]].mean())


def bigram_bits(train: np.ndarray, tokens: np.ndarray) -> float:
    """The same when the frequencies of the pairs of neighbouring bytes are known."""
    pairs = train[:-1].astype(np.int64) * VOCABULARY + train[1:]
    counts = np.bincount(pairs, minlength=VOCABULARY**2).reshape(VOCABULARY, VOCABULARY) + 0.01
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    return float(bits[tokens[:, :-1], tokens[:, 1:]].mean())
