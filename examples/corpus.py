"""Text for byte-level language models: the files of a folder, split into train and held-out."""

import hashlib
import os
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "__pycache__", ".git"}
)
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Two runs of bytes, uint8 (n,), from different files."""

    train: Tensor
    held_out: Tensor
    files: int

    def fingerprint(self) -> int:
        """A checksum of the whole text, to see that a resumed run reads the same."""
        checksum = zlib.crc32(self.train.cpu().numpy())
        return zlib.crc32(self.held_out.cpu().numpy(), checksum)

    def to(self, device: torch.device) -> "Corpus":
        return Corpus(self.train.to(device), self.held_out.to(device), self.files)

    def batch(self, seed: int, step: int, batch: int, seqlen: int) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow, int64 (batch, seqlen), from random places in train.

        The places depend on seed and step alone, so a resumed run reads what it would have read.
        """
        # The generator takes 32 bits of the seed, so step and seed share them.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)
        starts = torch.randint(len(self.train) - seqlen, (batch,), generator=generator)
        return windows(self.train, starts, seqlen)

    def held_out_batches(self, count: int, batch: int, seqlen: int) -> list[tuple[Tensor, Tensor]]:
        """count batches from places spread evenly over the held-out text."""
        last = len(self.held_out) - seqlen - 1
        starts = torch.linspace(0, last, count * batch).long()
        return [windows(self.held_out, part, seqlen) for part in starts.split(batch)]


def windows(text: Tensor, starts: Tensor, seqlen: int) -> tuple[Tensor, Tensor]:
    index = starts[:, None] + torch.arange(seqlen + 1)
    rows = text[index.to(text.device)].long()
    return rows[:, :-1], rows[:, 1:]


def unigram_entropy(text: Tensor) -> float:
    """Entropy in nats per byte of the byte frequencies: what no context-free model can beat."""
    p = torch.bincount(text.cpu().long(), minlength=256).double() / len(text)
    return float(torch.special.entr(p).sum())


def load_corpus(folder: str | None = None, pattern: str | None = None) -> Corpus:
    """Read every UTF-8 file under folder and hold out about a tenth of the bytes.

    Args:
        folder: where to look; None is the standard library of the running Python. Folders named
            in ``SKIPPED_FOLDERS`` are left out.
        pattern: glob of file names; None is ``*.py`` for the standard library, else ``*``.

    Returns:
        The corpus. Whole files are held out, chosen by a hash of their path relative to folder; a
        single file is cut at nine tenths instead.

    Raises:
        ValueError: folder is not a folder, or no text is found.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    pattern = pattern or ("*" if folder else "*.py")
    if not root.is_dir():
        raise ValueError(f"data={str(root)!r} is not a folder")
    texts = {
        p.relative_to(root).as_posix(): text for p in _files(root) if (text := _read(p, pattern))
    }
    if not texts:
        raise ValueError(f"data={str(root)!r} holds no UTF-8 text in files named {pattern!r}")

    if len(texts) == 1:
        (text,) = texts.values()
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        train, held_out = text[:cut], text[cut:]
    else:
        # In the order of the hashes: the first files up to a tenth of the bytes, at least one.
        names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
        budget = HELD_OUT_SHARE * sum(map(len, texts.values()))
        taken, size = [], 0
        while len(names) > 1 and (not taken or size + len(texts[names[0]]) <= budget):
            taken.append(names.pop(0))
            size += len(texts[taken[-1]])
        train, held_out = (b"\n".join(texts[n] for n in sorted(part)) for part in (names, taken))
    return Corpus(_as_tensor(train), _as_tensor(held_out), files=len(texts))


def _files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        found += [Path(folder) / name for name in sorted(names)]
    return found


def _read(path: Path, pattern: str) -> bytes:
    """The file's bytes, or nothing for another name, an unreadable file or one that is no text."""
    if not path.match(pattern):
        return b""
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    return b"" if b"\0" in text else text


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0).byte()
