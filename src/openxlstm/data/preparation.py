"""Corpus to token shards, with a progress bar: :func:`prepare`.

The corpus is read twice: once to check it, measure it and fix the split, once to tokenise. The output depends
on the documents, the tokenizer and ``shard_tokens`` alone: not on the number of workers, nor on
interruptions.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from openxlstm.checkpoint.tokenizer import Tokenizer
from openxlstm.data.corpus import SPLITS, Corpus, CorpusDocument, Sources, open_corpus
from openxlstm.data.shards import (
    MANIFEST,
    CorpusInfo,
    Manifest,
    ShardBuffer,
    SplitInfo,
    TokenizerInfo,
    shard_paths,
)
from openxlstm.data.sources import FileTree, Source
from openxlstm.data.workers import default_workers, encode_documents


def prepare(
    sources: Corpus | Sources,
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float | None = None,
    validation_sources: Sources | None = None,
    text_field: str = "text",
    shard_tokens: int = 1 << 25,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Tokenise a corpus into memory-mapped shards, for :class:`~openxlstm.data.dataset.TokenDataset`.

    Calling it again with the same arguments continues where an interrupted call stopped (finished shards are
    kept; a killed process loses at most the shards it was filling) and returns at once if nothing is left to
    do. The result is bit-identical however often it was interrupted and however many workers took part.

    Args:
        sources: paths or sources, one or several, or an opened :class:`~openxlstm.data.corpus.Corpus`.
            Directories are read as all their text files, ``.jsonl`` files line by line; see
            :mod:`openxlstm.data.sources` for more control.
        output: directory to write; new, empty, or from an earlier call with the same settings.
        tokenizer: must have an end-of-text token; it is saved in ``output``.
        validation_fraction: part of the text to hold out, 0 <= f < 1, chosen by document (default 0.05; see
            :mod:`openxlstm.data.corpus`).
        validation_sources: sources to hold out instead.
        text_field: the field of JSON Lines files given as paths.
        shard_tokens: tokens after which a shard ends; two shards are held in memory while they fill.
        workers: processes; ``None``: one for a small corpus, else one per core. With several, a script must
            have its ``if __name__ == "__main__":``.
        progress: show a progress bar on standard error.

    Returns:
        the manifest of the finished directory; ``print(manifest.summary())`` says what is in it.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: empty or malformed corpus, settings out of range, or ``output`` holds something else.
        OSError: the disk is full or not writable; what is finished stays.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    check_workers(workers)
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no end-of-text token to separate documents; name one as its eos")
    if isinstance(sources, Corpus):
        if validation_fraction is not None or validation_sources is not None:
            raise ValueError("an opened corpus is already split; give validation_... to open_corpus instead")
        corpus = sources
    else:
        corpus = open_corpus(
            sources,
            validation_fraction=validation_fraction,
            validation_sources=validation_sources,
            text_field=text_field,
            progress=progress,
        )
    output = Path(output)
    check_output(output, (*corpus.sources, *corpus.validation_sources))
    manifest = _begin(
        output, Manifest(_describe_tokenizer(tokenizer), _describe_corpus(corpus), shard_tokens)
    )
    if not manifest.complete:
        tokenizer.save(output)
        workers = default_workers(corpus.text_bytes) if workers is None else workers
        try:
            manifest = _write_shards(corpus, output, tokenizer, manifest, workers, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("finished shards are kept; the same command continues there") from None
    return manifest


def _write_shards(
    corpus: Corpus, output: Path, tokenizer: Tokenizer, manifest: Manifest, workers: int, progress: bool
) -> Manifest:
    """Tokenise what the manifest does not list yet; return the manifest of the finished directory."""
    dtype = manifest.tokenizer.dtype
    buffers = {split: ShardBuffer(dtype) for split in SPLITS}

    def finish_shard(split: str) -> None:
        nonlocal manifest
        shards = manifest.split(split).shards
        info = buffers[split].write(output, split, len(shards))
        listed = SplitInfo([*shards, info])
        manifest = (
            replace(manifest, train=listed) if split == "train" else replace(manifest, validation=listed)
        )
        manifest.write(output)
        buffers[split] = ShardBuffer(dtype)

    done = sum(manifest.split(split).text_bytes for split in SPLITS)
    with tqdm(
        desc="tokenising",
        total=corpus.text_bytes,
        initial=done,
        unit="B",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        remaining = _after_finished(corpus, {split: manifest.split(split).documents for split in SPLITS})
        for documents, encoded in encode_documents(remaining, tokenizer, dtype, workers):
            for document, tokens in zip(documents, encoded, strict=True):
                buffer = buffers[document.split]
                buffer.append(tokens, document.size)
                if buffer.tokens >= manifest.shard_tokens:
                    finish_shard(document.split)
                bar.update(document.size)
    for split in SPLITS:
        if buffers[split].tokens:
            finish_shard(split)
    manifest = replace(manifest, complete=True)
    manifest.write(output)
    return manifest


def _after_finished(corpus: Corpus, finished: dict[str, int]) -> Iterator[CorpusDocument]:
    """The documents without the first ``finished[split]`` of each split."""
    for document in corpus.read():
        if finished[document.split] > 0:
            finished[document.split] -= 1
        else:
            yield document


# ---------------------------------------------------------------------- the directory


def check_workers(workers: int | None) -> None:
    """Refuse a number of processes below one.

    Raises:
        ValueError: as said.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")


def check_output(output: str | Path, sources: Iterable[Source]) -> None:
    """Refuse a directory that :func:`prepare` could not write ``sources`` to. Changes nothing.

    Raises:
        NotADirectoryError: it is a file, or below one.
        PermissionError: it may not be written.
        ValueError: it lies inside of a source, or holds something else.
    """
    output = Path(output)
    _refuse_output_inside(sources, output)
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"'{existing}' is a file; name a directory for the prepared data")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"'{existing}' is not writable; choose another directory")
    if existing is not output:
        return
    if (output / MANIFEST).exists():
        Manifest.read(output)
        return
    foreign = sorted(path.name for path in output.iterdir() if not _TEMPORARY_MANIFEST.fullmatch(path.name))
    if foreign:
        raise ValueError(
            f"'{output}' already holds other files ({', '.join(foreign[:3])}); choose a new directory"
        )


def _begin(output: Path, wanted: Manifest) -> Manifest:
    """Make ``output`` ready: start it, or check that what it holds belongs to ``wanted`` and return that."""
    if not (output / MANIFEST).exists():
        output.mkdir(parents=True, exist_ok=True)
        wanted.write(output)
        _remove_temporary(output)
        return wanted
    found = Manifest.read(output)
    if changed := _differences(found, wanted):
        raise ValueError(
            f"'{output}' was prepared with {'; '.join(changed)}. Choose another directory or delete this one"
        )
    for split in SPLITS:
        for index in range(len(found.split(split).shards)):
            for path in shard_paths(output, split, index):
                if not path.is_file():
                    raise ValueError(f"'{path}' is missing; delete '{output}' and prepare again")
    _remove_temporary(output)
    return found


_TEMPORARY_MANIFEST = re.compile(rf"\.{re.escape(MANIFEST)}\.\d+\.tmp")
_TEMPORARY = re.compile(
    r"\.(tokenizer(_config)?\.json|manifest\.json|(train|validation)-\d+\.(tokens|ends)\.bin)\.\d+\.tmp"
)
"""Names under which a killed process may have left a file (see ``runtime.atomic_write_bytes``)."""


def _remove_temporary(output: Path) -> None:
    """Remove what a killed process left; ``output`` must hold our manifest."""
    for path in output.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _differences(found: Manifest, wanted: Manifest) -> list[str]:
    """What keeps ``found`` from being continued as ``wanted``, as phrases."""
    changed: list[str] = []
    if found.tokenizer != wanted.tokenizer:
        changed.append(
            f"another tokenizer ({found.tokenizer.vocab_size} tokens, now {wanted.tokenizer.vocab_size})"
        )
    if found.shard_tokens != wanted.shard_tokens:
        changed.append(f"shard_tokens={found.shard_tokens}, now {wanted.shard_tokens}")
    if found.corpus.validation != wanted.corpus.validation:
        changed.append(f"validation by {found.corpus.validation}, now {wanted.corpus.validation}")
    if found.corpus.digest != wanted.corpus.digest:
        changed.append(
            f"another corpus ({found.corpus.documents} documents of {found.corpus.text_bytes} bytes, "
            f"now {wanted.corpus.documents} of {wanted.corpus.text_bytes})"
        )
    elif not changed and found.corpus.threshold != wanted.corpus.threshold:
        changed.append("another split of the same corpus")
    return changed


def _describe_tokenizer(tokenizer: Tokenizer) -> TokenizerInfo:
    digest = hashlib.blake2b(digest_size=16)
    for name, text in sorted(tokenizer.files().items()):
        digest.update(f"{name}\0{text}\0".encode())
    eos = tokenizer.eos_id
    if eos is None:
        raise ValueError("the tokenizer has no end-of-text token")
    bos = eos if tokenizer.bos_id is None else tokenizer.bos_id
    return TokenizerInfo(digest.hexdigest(), tokenizer.vocab_size, bos, eos)


def _describe_corpus(corpus: Corpus) -> CorpusInfo:
    return CorpusInfo(
        sources=[source.name for source in corpus.sources],
        documents=corpus.documents,
        text_bytes=corpus.text_bytes,
        digest=corpus.digest,
        validation=corpus.validation,
        threshold=corpus.threshold,
        skipped=corpus.skipped,
    )


def _refuse_output_inside(sources: Iterable[Source], output: Path) -> None:
    """The output must not become part of the corpus."""
    for source in sources:
        if isinstance(source, FileTree):
            root = Path(source.path).resolve()
            if root == output.resolve() or root in output.resolve().parents:
                raise ValueError(
                    f"the output directory '{output}' lies inside the corpus '{source.path}'; "
                    "choose one outside of it"
                )
