"""Preparation: bit-identical output, resuming after errors and kills, refusals, damage."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import openxlstm.runtime
from openxlstm.checkpoint.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from openxlstm.data import Manifest, Texts, TokenDataset, open_corpus, prepare, workers


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def bpe(texts: list[str]) -> Tokenizer:
    return train_bpe(texts, 300)


@pytest.fixture(scope="module")
def whole(texts: list[str], bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared in one go."""
    directory = tmp_path_factory.mktemp("whole")
    prepare(Texts(texts), directory, bpe, validation_fraction=0.2, shard_tokens=1500, progress=False)
    return directory


def again(texts: list[str], bpe: Tokenizer, directory: Path, **changes: object) -> Manifest:
    settings = {"validation_fraction": 0.2, "shard_tokens": 1500, "progress": False} | changes
    return prepare(Texts(texts), directory, bpe, **settings)  # pyright: ignore[reportArgumentType]


def test_contents(texts: list[str], bpe: Tokenizer, whole: Path) -> None:
    manifest = Manifest.read(whole)
    corpus = open_corpus(Texts(texts), validation_fraction=0.2)
    assert manifest.complete
    for split in ("train", "validation"):
        expected = list(corpus.texts(split))
        dataset = TokenDataset.open(whole, split)
        assert dataset.num_documents == len(expected)
        assert dataset.text_bytes == sum(len(text.encode()) for text in expected)
        assert len(dataset) == sum(len(bpe.encode(text, bos=False)) + 1 for text in expected)
        for n, text in enumerate(expected):
            assert dataset.document(n).tolist() == bpe.encode(text, bos=False)
        with pytest.raises(IndexError, match="no document"):
            dataset.document(len(expected))
        dataset.verify()
    assert len(manifest.train.shards) > 3
    assert all(shard.tokens >= 1500 for shard in manifest.train.shards[:-1])
    assert "train" in manifest.summary()
    assert TokenDataset.open(whole).tokenizer().to_json() == bpe.to_json()


def test_bits_per_byte(whole: Path) -> None:
    dataset = TokenDataset.open(whole, "validation")
    assert dataset.bits_per_byte(np.log(2)) == pytest.approx(len(dataset) / dataset.text_bytes)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_tokens([f"<{n}>" for n in range(70_000)])
    prepare(Texts(["a<69999>"]), tmp_path / "d", tokenizer, validation_fraction=0, progress=False)
    dataset = TokenDataset.open(tmp_path / "d")
    assert dataset.document(0).tolist() == [98, 257 + 69_999]
    assert dataset.max_token_id == 257 + 69_999
    assert (tmp_path / "d" / "train-00000.tokens.bin").stat().st_size == 3 * 4


def test_empty_and_short_texts(tmp_path: Path) -> None:
    prepare(
        Texts(["", " ", "x", ""]), tmp_path / "d", byte_tokenizer(), validation_fraction=0, progress=False
    )
    dataset = TokenDataset.open(tmp_path / "d")
    assert [dataset.document(n).tolist() for n in range(2)] == [[33], [121]]


def test_progress_bar_ends_full(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prepare(Texts(["x" * 1000]), tmp_path / "d", byte_tokenizer(), validation_fraction=0)
    assert "100%" in capsys.readouterr().err


# ---------------------------------------------------------------------- the same whatever happens


def test_workers_give_identical_files(
    texts: list[str], bpe: Tokenizer, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK_BYTES", 500)  # many tasks
    again(texts, bpe, tmp_path / "two", workers=2)
    again(texts, bpe, tmp_path / "one", workers=1)
    assert contents(tmp_path / "two") == contents(tmp_path / "one") == contents(whole)


def test_repeating_does_nothing(texts: list[str], bpe: Tokenizer, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert again(texts, bpe, whole) == Manifest.read(whole)
    assert before == {path: path.stat().st_mtime_ns for path in whole.iterdir()}


@pytest.mark.parametrize("writes", [0, 1, 3, 4, 5, 6, 10, 14, 17])
def test_any_failing_write_can_be_continued(
    texts: list[str],
    bpe: Tokenizer,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
) -> None:
    """The disk is full at the n-th file; later there is room again."""
    directory, real = tmp_path / "d", os.replace
    left = writes

    def failing(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(openxlstm.runtime.os, "replace", failing)
        with pytest.raises(OSError, match="No space left"):
            again(texts, bpe, directory)
    assert not [name for name in contents(directory) if name.endswith(".tmp")]
    if writes:
        with pytest.raises(ValueError, match=r"prepared only in part .* run the same"):
            TokenDataset.open(directory)
    finished = (
        sum(len(Manifest.read(directory).split(s).shards) for s in ("train", "validation")) if writes else 0
    )
    stamps = {path: path.stat().st_mtime_ns for path in directory.glob("train-00000.*")}
    again(texts, bpe, directory)
    assert contents(directory) == contents(whole)
    if finished:
        assert stamps == {path: path.stat().st_mtime_ns for path in directory.glob("train-00000.*")}  # kept


class Interrupted(Texts):
    """Texts whose second reading stops after 90 documents."""

    reading = 0

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        type(self).reading += 1
        for number, text in enumerate(super().documents(skipped)):
            if type(self).reading == 2 and number == 90:
                raise KeyboardInterrupt
            yield text


def test_interruption_says_how_to_continue(
    texts: list[str], bpe: Tokenizer, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK_BYTES", 500)
    with pytest.raises(KeyboardInterrupt, match="finished shards are kept; the same command continues"):
        prepare(Interrupted(texts), tmp_path / "d", bpe, validation_fraction=0.2, shard_tokens=1500)
    assert Manifest.read(tmp_path / "d").train.shards
    again(texts, bpe, tmp_path / "d")
    assert contents(tmp_path / "d") == contents(whole)


SLOW_SCRIPT = """
    import json, sys, time
    from openxlstm.checkpoint.tokenizer import Tokenizer
    from openxlstm.data import Texts, prepare, workers

    class Slow(Texts):
        readings = 0
        def documents(self, skipped=None):
            Slow.readings += 1
            for text in self.texts:
                time.sleep(0.01 * (Slow.readings > 1))
                yield text

    if __name__ == "__main__":
        texts, tokenizer, output, count = sys.argv[1:]
        workers.CHUNK_BYTES = 500
        prepare(Slow(json.load(open(texts))), output, Tokenizer.load(tokenizer), validation_fraction=0.2,
                shard_tokens=1500, workers=int(count), progress=False)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for child processes in /proc")
@pytest.mark.parametrize("count", [1, 2])
def test_kill_and_continue(texts: list[str], bpe: Tokenizer, whole: Path, tmp_path: Path, count: int) -> None:
    (tmp_path / "run.py").write_text(textwrap.dedent(SLOW_SCRIPT))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    directory = tmp_path / "d"
    command = [tmp_path / "run.py", tmp_path / "texts.json", whole, directory, count]
    process = subprocess.Popen([sys.executable, *map(str, command)])
    try:
        deadline = time.monotonic() + 60
        while not (directory / "train-00001.ends.bin").exists():
            assert process.poll() is None, "finished or failed before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(children) >= count - 1
    (directory / f".manifest.json.{process.pid}.tmp").write_text("{")  # as if killed while writing
    assert not Manifest.read(directory).complete
    again(texts, bpe, directory)
    assert contents(directory) == contents(whole)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() and not _is_zombie(child) for child in children):
        assert time.monotonic() < deadline, "worker processes outlive the killed process"
        time.sleep(0.05)


def _is_zombie(process_id: str) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class Suicidal(Tokenizer):
    """Kills the process that uses it, as the system does when memory runs out."""

    def encode_batch(self, *_: object, **__: object) -> list[list[int]]:
        os._exit(9)


def test_a_worker_that_dies_is_reported(texts: list[str], tmp_path: Path) -> None:
    tokenizer = Suicidal(byte_tokenizer().backend)
    with pytest.raises(ChildProcessError, match="a tokenising process died"):
        again(texts, tokenizer, tmp_path / "d", workers=2)


# ---------------------------------------------------------------------- refusals


def test_other_settings_are_refused(texts: list[str], bpe: Tokenizer, whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(ValueError, match=r"validation by fraction 0\.2, now fraction 0\.1\. Choose another"):
        again(texts, bpe, whole, validation_fraction=0.1)
    with pytest.raises(ValueError, match="shard_tokens=1500, now 7"):
        again(texts, bpe, whole, shard_tokens=7)
    with pytest.raises(ValueError, match=r"another tokenizer \(300 tokens, now 257\)"):
        again(texts, byte_tokenizer(), whole)
    with pytest.raises(ValueError, match=r"another corpus \(120 documents of \d+ bytes, now 119"):
        again(texts[1:], bpe, whole)
    assert contents(whole) == before


def test_foreign_directories_are_refused(texts: list[str], bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(
        ValueError, match=r"already holds other files \(thesis\.tex\); choose a new directory"
    ):
        again(texts, bpe, tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        again(texts, bpe, tmp_path / "thesis.tex")
    (tmp_path / "manifest.json").write_text('{"format": "someone else\'s"}')
    with pytest.raises(ValueError, match="does not describe prepared data of openxlstm"):
        again(texts, bpe, tmp_path)
    assert len(contents(tmp_path)) == 2
    with pytest.raises(ValueError, match="lies inside the corpus"):
        prepare(tmp_path, tmp_path / "data", bpe, progress=False)
    assert not (tmp_path / "data").exists()


def test_only_our_own_temporary_files_are_removed(texts: list[str], bpe: Tokenizer, tmp_path: Path) -> None:
    output = tmp_path / "d"
    output.mkdir()
    (output / ".draft.7.tmp").write_text("precious")
    with pytest.raises(ValueError, match=r"already holds other files \(\.draft\.7\.tmp\)"):
        again(texts, bpe, output)
    (output / ".draft.7.tmp").rename(tmp_path / "draft")
    (output / ".manifest.json.7.tmp").write_text("{")  # as if killed while writing the first manifest
    again(texts, bpe, output)
    names = set(contents(output))
    (output / ".train-00000.ends.bin.7.tmp").write_text("")
    (tmp_path / "draft").rename(output / ".draft.7.tmp")
    again(texts, bpe, output)
    assert set(contents(output)) == names | {".draft.7.tmp"}


def test_bad_arguments(texts: list[str], bpe: Tokenizer, tmp_path: Path) -> None:
    for changes, message in (
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            again(texts, bpe, tmp_path / "d", **changes)
    with pytest.raises(ValueError, match="no end-of-text token"):
        again(texts, Tokenizer(bpe.backend, eos=None), tmp_path / "d")
    with pytest.raises(ValueError, match="already split"):
        prepare(open_corpus(Texts(texts)), tmp_path / "d", bpe, validation_fraction=0.5)
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        prepare(tmp_path / "nowhere", tmp_path / "d", bpe)
    with pytest.raises(ValueError, match="corpus is empty"):
        prepare(Texts([]), tmp_path / "d", bpe)
    assert not (tmp_path / "d").exists()


class Outside(Tokenizer):
    """Gives an id that its vocabulary does not have."""

    def encode_batch(self, texts: object, **_: object) -> list[list[int]]:  # pyright: ignore
        return [[300] for _ in texts]  # pyright: ignore


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token id 300, outside its vocabulary of 257 tokens"):
        again(["a", "b"], Outside(byte_tokenizer().backend), tmp_path / "d")


# ---------------------------------------------------------------------- damage


def test_opening_what_is_not_there(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data directory '.*nowhere' does not exist"):
        TokenDataset.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no prepared data in"):
        TokenDataset.open(tmp_path)
    with pytest.raises(ValueError, match="no split 'test'"):
        TokenDataset.open(whole, "test")
    prepare(Texts(["a"]), tmp_path / "d", byte_tokenizer(), validation_fraction=0, progress=False)
    with pytest.raises(ValueError, match="no validation split"):
        TokenDataset.open(tmp_path / "d", "validation")


def test_damaged_directories(texts: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "d"
    prepare(Texts(texts), directory, byte_tokenizer(), validation_fraction=0, progress=False)
    good = contents(directory)

    def damage(name: str, data: bytes | None) -> None:
        for other, content in good.items():
            (directory / other).write_bytes(content)
        if data is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(data)

    tokens, ends, manifest = (
        "train-00000.tokens.bin",
        "train-00000.ends.bin",
        json.loads(good["manifest.json"]),
    )
    damage(tokens, good[tokens][:-2])
    with pytest.raises(ValueError, match=r"tokens\.bin' has \d+ bytes instead of \d+: it is damaged"):
        TokenDataset.open(directory)
    damage(tokens, None)
    with pytest.raises(FileNotFoundError, match=r"tokens\.bin' is missing"):
        TokenDataset.open(directory)
    with pytest.raises(ValueError, match=r"tokens\.bin' is missing; delete"):
        prepare(Texts(texts), directory, byte_tokenizer(), validation_fraction=0, progress=False)
    damage(ends, good[ends][:-8] + b"\0" * 8)
    with pytest.raises(ValueError, match="does not belong to its shard"):
        TokenDataset.open(directory)
    damage(tokens, b"\1\0" + good[tokens][2:])
    with pytest.raises(ValueError, match="is damaged"):
        TokenDataset.open(directory).verify()
    damage("manifest.json", good["manifest.json"][:100])
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged"):
        TokenDataset.open(directory)
    damage("manifest.json", json.dumps(manifest | {"corpus": 3}).encode())
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged: corpus"):
        TokenDataset.open(directory)
    damage("manifest.json", json.dumps(manifest | {"format_version": 99}).encode())
    with pytest.raises(ValueError, match="has format version 99"):
        TokenDataset.open(directory)


def test_shards_are_mapped_not_read(whole: Path, tmp_path: Path) -> None:
    """A shard of two sparse gigabytes opens at once, and reading a window touches little of it."""
    dataset = TokenDataset.open(whole)
    assert all(isinstance(array.base, np.memmap) for array in (*dataset._tokens, *dataset._ends))
    with pytest.raises(ValueError, match="read-only"):
        dataset._tokens[0][0] = 1
    if sys.platform != "linux":
        return
    prepare(Texts(["a"]), tmp_path / "d", byte_tokenizer(), validation_fraction=0, progress=False)
    length = 1 << 30
    os.truncate(tmp_path / "d" / "train-00000.tokens.bin", 2 * length)
    (tmp_path / "d" / "train-00000.ends.bin").write_bytes(np.array([length], "<i8").tobytes())
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    manifest["train"]["shards"][0]["tokens"] = length
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    before = _resident_bytes()
    large = TokenDataset.open(tmp_path / "d")
    outputs = np.zeros(1000, np.int64), np.zeros(1000, np.int64), np.zeros(1000, np.bool_)
    large.read(length // 2, *outputs)
    assert len(large) == length
    assert _resident_bytes() - before < 64 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
