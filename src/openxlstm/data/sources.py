"""Where text comes from: files, JSON Lines, directories of source files, or strings in memory.

A *source* yields documents, non-empty strings of valid Unicode, always in the same order and each time it is
asked. What cannot be a document (binary files, files that are not UTF-8, empty ones) is left out and counted,
never silently. Reading is streaming: the largest thing in memory is one document.

- :class:`TextFile`: one file, divided at a separator or, without one, at line ends into pieces.
- :class:`JSONLines`: one document per line, taken from a field.
- :class:`FileTree`: every file below a directory that matches a pattern is one document.
- :class:`Texts`: strings in memory.

Names ending in ``.gz`` are decompressed. :func:`as_source` chooses by what a path is.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast, runtime_checkable

from openxlstm.data.globs import matches

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
"""Files with these endings are read as JSON Lines wherever they are found."""

DEFAULT_EXCLUDE = ("__pycache__", ".git", ".hg", ".svn", ".venv", "node_modules", ".DS_Store")
"""What :class:`FileTree` passes over unless told otherwise."""


@runtime_checkable
class Source(Protocol):
    """Anything that can be read as documents, repeatedly and in a fixed order."""

    @property
    def name(self) -> str:
        """What to call the source in messages and in the manifest."""
        ...

    def check(self) -> None:
        """Raise ``FileNotFoundError`` if there is nothing to read; cheap."""
        ...

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        """Yield the documents in order; add to ``skipped`` what was left out, by reason."""
        ...


@dataclass(frozen=True)
class Texts:
    """Documents held in memory; empty strings are left out."""

    texts: Sequence[str]
    name: str = "texts in memory"

    def check(self) -> None:
        """Nothing can be missing."""

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        """Yield the texts in order; half surrogate pairs become U+FFFD."""
        return (_valid_unicode(text) for text in self.texts if text)


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 text file.

    Args:
        path: the file; ``.gz`` is decompressed.
        separator: text between documents, such as ``"<|endoftext|>"`` or ``"\\n\\n\\n"``; it is removed.
            ``None`` divides the file at blank lines (else line ends) into pieces of at most
            ``piece_characters``, so that there is something to hold out for validation; joined, the pieces
            are the file.
        piece_characters: the most characters in a piece; raise it to train on longer contexts. ``None``:
            16384, in smaller files a sixteenth of the file, but at least 128.

    Raises:
        ValueError: empty separator, or not UTF-8 when read.
    """

    path: str | Path
    separator: str | None = None
    piece_characters: int | None = None

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ValueError(
                "the document separator is empty; give some text, or None to divide at line ends"
            )
        if self.piece_characters is not None and self.piece_characters < 1:
            raise ValueError(f"piece_characters must be at least 1, got {self.piece_characters}")

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def check(self) -> None:
        """Raise ``FileNotFoundError`` if there is no such file."""
        _require_file(Path(self.path))

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        """Yield the separated documents, or the pieces, in file order."""
        self.check()
        with _opened(Path(self.path)) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            try:
                yield from self._separated(text) if self.separator else self._pieces(text)
            except UnicodeDecodeError:
                raise ValueError(f"'{self.path}' is not UTF-8 text; convert it to UTF-8 first") from None
            finally:
                text.detach()

    def _separated(self, text: IO[str]) -> Iterator[str]:
        separator = cast(str, self.separator)
        rest: list[str] = []  # read, without a separator so far
        tail = ""  # may hold the beginning of a separator
        while chunk := text.read(1 << 20):
            first, *others = (tail + chunk).split(separator)
            rest.append(first)
            for piece in others:
                if document := "".join(rest):
                    yield document
                rest = [piece]
            keep = len(separator) - 1
            tail = rest[-1][-keep:] if keep else ""
            rest[-1] = rest[-1][: len(rest[-1]) - len(tail)]
        if document := "".join(rest) + tail:
            yield document

    def _pieces(self, text: IO[str]) -> Iterator[str]:
        buffer, ended = text.read(1 << 20), False
        size = self.piece_characters or min(max(len(buffer) // 16, 128), 16384)
        while True:
            if len(buffer) <= size and not ended:
                chunk = text.read(max(size, 1 << 20))
                ended = not chunk
                buffer += chunk
                continue
            if not buffer:
                return
            start = 0
            while len(buffer) - start > size:
                cut = self._cut(buffer, start, start + size)
                yield buffer[start:cut]
                start = cut
            buffer = buffer[start:]
            if ended:
                yield buffer
                return

    @staticmethod
    def _cut(text: str, start: int, stop: int) -> int:
        """The best place to end a piece in ``text[start:stop]``: a blank line, a line end, anywhere."""
        middle = (start + stop) // 2
        if (blank := text.rfind("\n\n", middle, stop)) >= 0:
            return blank + 2
        if (line := text.rfind("\n", start, stop)) >= 0:
            return line + 1
        return stop


@dataclass(frozen=True)
class JSONLines:
    """A file with one JSON object per line.

    Args:
        path: the file; ``.gz`` is decompressed.
        text_field: the field with the document's text; ``"meta.body"`` descends into nested objects.

    Blank lines are passed over, empty texts are counted as skipped, half surrogate pairs become U+FFFD.
    """

    path: str | Path
    text_field: str = "text"

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def check(self) -> None:
        """Raise ``FileNotFoundError`` if there is no such file."""
        _require_file(Path(self.path))

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        """Yield the texts in line order.

        Raises:
            ValueError: a line that is not a JSON object, or without a text in ``text_field``; names the line.
        """
        self.check()
        with _opened(Path(self.path)) as binary:
            for number, line in enumerate(binary, 1):
                if not line.strip():
                    continue
                if text := self._text(line, f"'{self.path}' line {number}"):
                    yield text
                elif skipped is not None:
                    skipped["empty"] += 1

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise ValueError(f"{where} is not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not valid JSON ({error})") from None
        value = record
        for key in self.text_field.split("."):
            if not isinstance(value, dict) or key not in value:
                found = (
                    f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else "not an object"
                )
                raise ValueError(f"{where} has no field '{self.text_field}' ({found}); choose the text field")
            value = value[key]
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: field '{self.text_field}' must hold a text, got {type(value).__name__}"
            )
        return _valid_unicode(value)


@dataclass(frozen=True)
class FileTree:
    """The files below a directory, each one document, in sorted order.

    Args:
        path: the directory.
        patterns: globs that a file must match (one of them), relative to ``path`` with forward slashes:
            ``*`` stays within a name, ``**/`` spans directories. A pattern without a slash is matched against
            the file name alone.
        exclude: globs of files and directories to leave out, by name or relative path likewise.
        text_field: for the JSON Lines files among them, which give one document per line.
        max_bytes: leave out larger files (counted), such as generated tables.

    Links are followed; a directory that was already visited is not entered again, so loops end. Binary files
    (containing a zero byte), files that are not UTF-8, empty and unreadable ones are counted as skipped.
    """

    path: str | Path
    patterns: tuple[str, ...] = ("**/*",)
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    text_field: str = "text"
    max_bytes: int | None = None

    @property
    def name(self) -> str:
        """The path and the patterns."""
        patterns = "" if self.patterns == ("**/*",) else f" ({', '.join(self.patterns)})"
        return f"{self.path}{patterns}"

    def check(self) -> None:
        """Raise ``FileNotFoundError`` or ``NotADirectoryError`` if there is no such directory."""
        if not Path(self.path).exists():
            raise FileNotFoundError(f"corpus directory '{self.path}' does not exist")
        if not Path(self.path).is_dir():
            raise NotADirectoryError(f"'{self.path}' is not a directory")

    def files(self, skipped: Counter[str] | None = None) -> Iterator[Path]:
        """The matching files in reading order, before looking into them."""
        self.check()
        counts = Counter() if skipped is None else skipped
        root = Path(self.path)
        yield from self._walk(root, "", {_identity(root)}, counts)

    def _walk(
        self, directory: Path, prefix: str, visited: set[tuple[int, int]], skipped: Counter[str]
    ) -> Iterator[Path]:
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            skipped["unreadable"] += 1
            return
        for name in names:
            path, relative = directory / name, prefix + name
            if matches(relative, self.exclude):
                continue
            if path.is_dir():
                identity = _identity(path)
                if identity not in visited:
                    visited.add(identity)
                    yield from self._walk(path, relative + "/", visited, skipped)
            elif path.is_file() and matches(relative, self.patterns):
                yield path

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        """Yield the texts of the files in sorted order."""
        counts = Counter() if skipped is None else skipped
        for path in self.files(counts):
            if path.name.lower().endswith(JSON_LINES_SUFFIXES):
                yield from JSONLines(path, self.text_field).documents(counts)
                continue
            try:
                if self.max_bytes is not None and path.stat().st_size > self.max_bytes:
                    counts["too large"] += 1
                    continue
                data = path.read_bytes()
            except OSError:
                counts["unreadable"] += 1
                continue
            if b"\0" in data:
                counts["binary"] += 1
                continue
            try:
                text = data.decode("utf-8-sig")
            except UnicodeDecodeError:
                counts["not UTF-8"] += 1
                continue
            if text:
                yield text
            else:
                counts["empty"] += 1


def as_source(
    path: str | Path | Source,
    *,
    text_field: str = "text",
    patterns: Iterable[str] = ("**/*",),
    separator: str | None = None,
) -> Source:
    """The source for a path: a directory, JSON Lines (by its ending), or else a text file.

    Args:
        path: what to read; a source is returned as it is.
        text_field: see :class:`JSONLines`.
        patterns: see :class:`FileTree`.
        separator: see :class:`TextFile`.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: a separator for what is not a text file.
    """
    if isinstance(path, Source):
        return path
    if not Path(path).exists():
        raise FileNotFoundError(f"corpus '{path}' does not exist")
    is_directory, is_lines = Path(path).is_dir(), str(path).lower().endswith(JSON_LINES_SUFFIXES)
    if separator is not None and (is_directory or is_lines):
        raise ValueError(
            f"a separator divides text files, but '{path}' is "
            f"{'a directory, whose files' if is_directory else 'JSON Lines, whose lines'} are the documents; "
            "leave the separator out"
        )
    if is_directory:
        return FileTree(path, patterns=tuple(patterns), text_field=text_field)
    if is_lines:
        return JSONLines(path, text_field)
    return TextFile(path, separator)


def python_standard_library() -> FileTree:
    """The source text of the running Python's standard library: real text on every machine.

    Installed packages, tests, and generated or repetitive parts (encoding tables, pydoc's topics, the retired
    ``lib2to3`` and ``distutils``) are left out; some seven megabytes remain.
    """
    outside = (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "distutils",
    )
    generated = (
        "encodings",
        "pydoc_data",
        "turtledemo",
        "ensurepip",
        "lib-dynload",
        "config-*",
        "_sysconfigdata*",
    )
    return FileTree(
        sysconfig.get_path("stdlib"),
        patterns=("**/*.py",),
        exclude=(*DEFAULT_EXCLUDE, *outside, *generated),
        max_bytes=200_000,
    )


# ---------------------------------------------------------------------- helpers


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a directory, not a file")
    if not path.exists():
        raise FileNotFoundError(f"corpus file '{path}' does not exist")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of ``path``, decompressed if it ends in ``.gz``."""
    with open(path, "rb") as file:
        if not path.name.lower().endswith(".gz"):
            yield file
            return
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast("IO[bytes]", unpacked)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"'{path}' is not a complete gzip file ({error})") from None


def _valid_unicode(text: str) -> str:
    """``text`` with half surrogate pairs, which JSON can spell but UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _identity(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino
