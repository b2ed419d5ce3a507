"""Sources: what becomes a document, in which order, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openxlstm.data import FileTree, JSONLines, Source, TextFile, Texts, as_source, python_standard_library


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_texts_drop_empty_and_repair_half_surrogates() -> None:
    assert list(Texts(["a", "", "b\ud800c", "🙂"]).documents()) == ["a", "b\ufffdc", "🙂"]
    assert isinstance(Texts([]), Source)


# ---------------------------------------------------------------------- text files


def test_text_file_pieces_end_at_blank_lines_and_join_to_the_file(tmp_path: Path) -> None:
    text = "".join(f"paragraph {n}\r\nwith naïve 数学 🙂 text\n\n" for n in range(200)) + "x" * 500
    pieces = list(TextFile(write(tmp_path / "a.txt", text), piece_characters=200).documents())
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 200 for piece in pieces)
    assert sum(piece.endswith("\n\n") for piece in pieces) > 0.9 * len(pieces)


@pytest.mark.parametrize(("lines", "longest"), [(5, 128), (300, 600), (30_000, 16384)])
def test_small_files_give_several_pieces(tmp_path: Path, lines: int, longest: int) -> None:
    text = "all work and no play makes jack\n" * lines
    path = write(tmp_path / "a.txt", text)
    pieces = list(TextFile(path).documents())
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= longest
    assert all(piece.endswith("\n") for piece in pieces)


@given(
    st.text(alphabet="ab\n", max_size=60),
    st.integers(1, 7),
    st.sampled_from([None, "a", "aa", "ab\n", "\n\n"]),
)
def test_text_file_equals_definition(text: str, size: int, separator: str | None) -> None:
    """Whatever the reads, pieces join to the text and separated documents are those of ``str.split``."""
    from io import StringIO

    class Dribble(StringIO):
        def read(self, _: int | None = -1, /) -> str:
            return super().read(3)

    source = TextFile("unused", separator, size)
    if separator is None:
        pieces = list(source._pieces(Dribble(text, newline="")))
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= size for piece in pieces)
        assert pieces == list(source._pieces(StringIO(text, newline="")))
    else:
        expected = [piece for piece in text.split(separator) if piece]
        assert list(source._separated(Dribble(text, newline=""))) == expected


def test_text_file_gzip_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("\ufeffone<eod>two".encode()))
    assert list(TextFile(path, "<eod>").documents()) == ["one", "two"]
    path.write_bytes(gzip.compress(os.urandom(1000).hex().encode())[:-20])
    with pytest.raises(ValueError, match=r"a\.txt\.gz' is not a complete gzip file"):
        list(TextFile(path).documents())
    path.write_bytes(b"plain")
    with pytest.raises(ValueError, match="not a complete gzip file"):
        list(TextFile(path).documents())


def test_text_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.txt' does not exist"):
        list(TextFile(tmp_path / "missing.txt").documents())
    with pytest.raises(IsADirectoryError, match="is a directory"):
        TextFile(tmp_path).check()
    with pytest.raises(ValueError, match=r"latin\.txt' is not UTF-8"):
        list(TextFile(write(tmp_path / "latin.txt", "naïve".encode("latin-1"))).documents())
    with pytest.raises(ValueError, match="separator is empty"):
        TextFile("a", "")
    with pytest.raises(ValueError, match="piece_characters must be at least 1, got 0"):
        TextFile("a", piece_characters=0)


# ---------------------------------------------------------------------- JSON Lines


def test_json_lines(tmp_path: Path) -> None:
    records = [{"text": "one\ntwo"}, {"text": ""}, {"text": "数学 🙂", "n": 1}]
    content = "\n\n".join(json.dumps(record) for record in records) + '\n{"text": "half \\ud800 pair"}'
    skipped: Counter[str] = Counter()
    expected = ["one\ntwo", "数学 🙂", "half \ufffd pair"]
    assert list(JSONLines(write(tmp_path / "a.jsonl", content)).documents(skipped)) == expected
    assert skipped == {"empty": 1}
    assert (
        list(JSONLines(write(tmp_path / "a.jsonl.gz", gzip.compress(content.encode()))).documents())
        == expected
    )
    nested = write(tmp_path / "b.jsonl", '{"meta": {"body": "deep"}}')
    assert list(JSONLines(nested, "meta.body").documents()) == ["deep"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl' line 3 is not valid JSON"),
        ("not json", r"a\.jsonl' line 3 is not valid JSON"),
        ('{"body": "x", "id": 3}', r"line 3 has no field 'text' \(it has 'body', 'id'\)"),
        ('["text"]', r"line 3 has no field 'text' \(not an object\)"),
        ('{"text": 7}', r"line 3: field 'text' must hold a text, got int"),
        (b'{"text": "\xff"}', r"line 3 is not UTF-8"),
        ("[" * 100_000, "line 3 is not valid JSON"),
    ],
)
def test_json_lines_name_file_and_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    line = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        list(JSONLines(path).documents())


# ---------------------------------------------------------------------- directories


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    write(root / "b.py", "b")
    write(root / "a" / "z.py", "z")
    write(root / "a" / "deep" / "y.py", "数学")
    write(root / "a.py", "a")
    write(root / "notes.txt", "notes")
    write(root / "binary.py", b"ab\0cd")
    write(root / "latin.py", b"\xff\xfe")
    write(root / "empty.py", b"")
    write(root / "__pycache__" / "c.py", "cached")
    write(root / "lines.jsonl", '{"text": "l1"}\n{"text": "l2"}')
    return root


def test_file_tree_order_and_counts(tree: Path) -> None:
    skipped: Counter[str] = Counter()
    assert list(FileTree(tree).documents(skipped)) == ["数学", "z", "a", "b", "l1", "l2", "notes"]
    assert skipped == {"binary": 1, "not UTF-8": 1, "empty": 1}


@pytest.mark.parametrize(
    ("patterns", "exclude", "expected"),
    [
        (("**/*.py",), (), "cached 数学 z a b"),
        (("*.py",), ("__pycache__",), "数学 z a b"),
        (("a/*.py",), (), "z"),
        (("a/**/*.py",), (), "数学 z"),
        (("**/[yz].py",), (), "数学 z"),
        (("**/[!yz].py",), ("__pycache__",), "a b"),
        (("?.py", "*.txt"), ("a/deep/", "__pycache__"), "z a b notes"),
        (("**/*.py",), ("a", "__pycache__"), "a b"),
        (("**/*.py",), ("**/y.py", "__pycache__"), "z a b"),
        (("./a.py",), (), "a"),
    ],
)
def test_file_tree_patterns(
    tree: Path, patterns: tuple[str, ...], exclude: tuple[str, ...], expected: str
) -> None:
    assert " ".join(FileTree(tree, patterns, exclude).documents()) == expected


def test_file_tree_size_limit(tree: Path) -> None:
    skipped: Counter[str] = Counter()
    write(tree / "large.py", "x" * 100)
    assert "x" * 100 not in list(FileTree(tree, max_bytes=99).documents(skipped))
    assert skipped["too large"] == 1


def test_bad_pattern_is_one_sentence(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"'\[z-a\]\.py' is not a valid file pattern"):
        list(FileTree(tree, ("[z-a].py",)).documents())


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges on Windows")
def test_file_tree_links(tree: Path, tmp_path: Path) -> None:
    os.symlink(tree, tree / "a" / "loop")
    os.symlink("self", tree / "self")
    os.symlink("nowhere", tree / "broken.py")
    write(tmp_path / "elsewhere" / "e.py", "linked")
    os.symlink(tmp_path / "elsewhere", tree / "c")
    assert " ".join(FileTree(tree, ("*.py",)).documents()) == "数学 z a b linked"


def test_as_source_and_missing(tree: Path, tmp_path: Path) -> None:
    assert as_source(tree, patterns=["*.py"]) == FileTree(tree, ("*.py",))
    assert as_source(tree / "lines.jsonl", text_field="t") == JSONLines(tree / "lines.jsonl", "t")
    assert as_source(tree / "a.py", separator="#") == TextFile(tree / "a.py", "#")
    for path, reason in ((tree, "is a directory"), (tree / "lines.jsonl", "is JSON Lines")):
        with pytest.raises(ValueError, match=reason):
            as_source(path, separator="#")
    source = Texts(["x"])
    assert as_source(source) is source
    with pytest.raises(FileNotFoundError, match="nothing' does not exist"):
        as_source(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FileTree(tmp_path / "nothing").check()
    with pytest.raises(NotADirectoryError, match="not a directory"):
        list(FileTree(tree / "a.py").documents())


def test_python_standard_library() -> None:
    source = python_standard_library()
    files = [path.relative_to(source.path).as_posix() for path in source.files()]
    assert "argparse.py" in files
    assert "json/decoder.py" in files
    assert not [f for f in files if "test" in f.split("/")[:-1] or "site-packages" in f or "encodings/" in f]
    assert files == [path.relative_to(source.path).as_posix() for path in source.files()]
    assert sum((Path(source.path) / f).stat().st_size for f in files) > 3_000_000
