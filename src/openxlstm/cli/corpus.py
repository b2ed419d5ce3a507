"""The demo's text: the Python standard library's own source, split into training and held-out files.

Every Python installation carries a few megabytes of it, so nothing is downloaded. Generated tables
(character maps, the pydoc topics) and the test suite, which not every distribution ships, are left out. The
split depends on the file names alone.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

EXCLUDED = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "distutils",
     "encodings", "pydoc_data", "ensurepip", "turtledemo"}
)  # fmt: skip
MAX_FILE_BYTES = 200_000


def standard_library_files(root: Path | None = None) -> list[tuple[str, bytes]]:
    """``(relative name, contents)`` of the standard library's source files, sorted by name.

    Raises:
        FileNotFoundError: this Python has no readable standard library source.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files: list[tuple[str, bytes]] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED.intersection(name.parts) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        text = path.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            files.append((name.as_posix(), text))
    if not files:
        raise FileNotFoundError(f"no Python source found at '{root}'; name a directory with --corpus")
    return files


def split(
    files: list[tuple[str, bytes]], held_out_bytes: int
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """Hold out whole files, in the order of a checksum of their names, until ``held_out_bytes`` are reached.

    Returns:
        training files and held-out files, each sorted by name.

    Raises:
        ValueError: nothing would be left to train on.
    """
    order = sorted(files, key=lambda file: (zlib.crc32(file[0].encode()), file[0]))
    total = taken = 0
    while taken < len(order) and total < held_out_bytes:
        total += len(order[taken][1])
        taken += 1
    if taken == len(order):
        raise ValueError(f"the corpus has {total} bytes, too few to hold out {held_out_bytes}")
    return sorted(order[taken:]), sorted(order[:taken])
