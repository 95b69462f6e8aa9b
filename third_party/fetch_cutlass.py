#!/usr/bin/env python3
"""Fetches the pinned CUTLASS headers into third_party/cutlass/include.

The pin (third_party/cutlass.txt) names a release of the PyPI package nvidia-cutlass and the sha256
of its wheel. pip downloads the wheel without its dependencies, with the user's own pip
configuration; the hash is checked here as well, then only the include folder is unpacked. Nothing
happens when the headers of the pinned release are there already.

    python third_party/fetch_cutlass.py                  # download
    python third_party/fetch_cutlass.py --wheel FILE     # from a file, on a machine without network
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN_FILE = HERE / "cutlass.txt"
TARGET = HERE / "cutlass"
INCLUDE_IN_WHEEL = "cutlass_library/source/include/"


class FetchError(RuntimeError):
    """The headers could not be fetched, or are not what the pin says."""


@dataclass(frozen=True)
class Pin:
    """One pinned wheel: ``requirement`` is ``name==version``, ``sha256`` 64 hex digits."""

    requirement: str
    sha256: str


def read_pin(path: Path = PIN_FILE) -> Pin:
    """Reads the one requirement of ``path``; FetchError if it has no version or no sha256."""
    text = path.read_text()
    match = re.search(r"^([\w.-]+==[\w.]+)\s+--hash=sha256:([0-9a-f]{64})\s*$", text, re.MULTILINE)
    if match is None:
        raise FetchError(f"{path}: expected one line 'name==version --hash=sha256:<64 hex digits>'")
    return Pin(*match.groups())


def check_hash(wheel: Path, pin: Pin) -> None:
    """Raises FetchError unless the bytes of ``wheel`` have the pinned sha256."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != pin.sha256:
        raise FetchError(
            f"{wheel.name}: sha256 is {digest}, but {PIN_FILE.name} pins {pin.sha256} for "
            f"{pin.requirement}: the file is damaged or is not that release"
        )


def download(pin: Pin, folder: Path) -> Path:
    """Downloads the pinned wheel into ``folder`` with pip and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--dest", str(folder), pin.requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise FetchError(
            f"pip could not download {pin.requirement}:\n{result.stderr.strip()}\n"
            "Without network, bring the wheel and type:\n"
            "    python third_party/fetch_cutlass.py --wheel FILE"
        )
    return wheels[0]


def unpack(wheel: Path, target: Path, pin: Pin) -> None:
    """Replaces ``target``/include by the wheel's include folder and stamps it with the pin."""
    check_hash(wheel, pin)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked beside the target and renamed, so that an interrupted run leaves no half folder.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.namelist() if m.startswith(INCLUDE_IN_WHEEL)]
            if not members:
                raise FetchError(f"{wheel.name}: holds no folder {INCLUDE_IN_WHEEL}")
            archive.extractall(scratch, members)
        fresh = Path(scratch) / "cutlass"
        fresh.mkdir()
        os.rename(Path(scratch) / INCLUDE_IN_WHEEL, fresh / "include")
        stamp_file(fresh).write_text(pin.sha256 + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(fresh, target)


def stamp_file(target: Path) -> Path:
    """The file in ``target`` that records which wheel its headers came from."""
    return target / "sha256"


def is_current(target: Path, pin: Pin) -> bool:
    """Whether ``target`` holds the headers of the pinned wheel."""
    stamp = stamp_file(target)
    return stamp.is_file() and stamp.read_text().strip() == pin.sha256


def fetch(target: Path = TARGET, pin: Pin | None = None, wheel: Path | None = None) -> Path:
    """Makes the pinned headers available and returns their include folder.

    Raises FetchError when pip cannot get the wheel or when its hash differs from the pin.
    """
    pin = pin or read_pin()
    if wheel is not None:
        unpack(wheel, target, pin)
    elif not is_current(target, pin):
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(pin, Path(folder)), target, pin)
    return target / "include"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the pinned CUTLASS headers.")
    parser.add_argument("--wheel", type=Path, help="take this wheel instead of downloading it")
    arguments = parser.parse_args()
    try:
        print(fetch(wheel=arguments.wheel))
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
