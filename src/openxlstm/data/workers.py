"""Tokenising in parallel: the same results in the same order for any number of processes.

Documents are cut into chunks of about a megabyte in the calling process. Chunks are tokenised by other
processes and come back in order; only a few per process are under way at a time, so memory does not depend
on the corpus.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from openxlstm.checkpoint.tokenizer import Tokenizer
from openxlstm.data.corpus import CorpusDocument
from openxlstm.runtime import end_with_parent

CHUNK_BYTES = 1 << 20
"""Text per task."""

SMALL_CORPUS_BYTES = 1 << 26
"""Below this, starting processes costs more than it saves."""


class EncodedChunk(NamedTuple):
    """Consecutive documents and their ids."""

    documents: list[CorpusDocument]
    tokens: list[npt.NDArray]
    """Per document its ids followed by end-of-text."""


def default_workers(text_bytes: int) -> int:
    """The number of processes for a corpus of this size: one if it is small, else one per available core."""
    if text_bytes < SMALL_CORPUS_BYTES:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), 32)
    return min(os.cpu_count() or 1, 32)


def encode_documents(
    documents: Iterable[CorpusDocument], tokenizer: Tokenizer, dtype: np.dtype, workers: int
) -> Iterator[EncodedChunk]:
    """Tokenise ``documents``, in order.

    Args:
        documents: read as needed.
        tokenizer: must have an end-of-text token.
        dtype: of the ids.
        workers: processes; 1 works in the calling process (with the tokenizers library's own threads).

    Raises:
        ValueError: a text that cannot be tokenised, or an id outside the tokenizer's vocabulary.
        ChildProcessError: a worker process died.
    """
    chunks = _chunks(documents)
    if workers == 1:
        encoder = _Encoder(tokenizer, dtype)
        for chunk in chunks:
            yield EncodedChunk(chunk, encoder.encode([document.text for document in chunk]))
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # forking a process with threads may deadlock
        initializer=_start_worker,
        initargs=(tokenizer, dtype),
    )
    try:
        pending: deque[tuple[list[CorpusDocument], Future[list[npt.NDArray]]]] = deque()
        while True:
            while len(pending) < 3 * workers and (chunk := next(chunks, None)) is not None:
                with _interrupts_ignored():  # what the processes that this starts inherit
                    future = pool.submit(_work, [document.text for document in chunk])
                pending.append((chunk, future))
            if not pending:
                return
            chunk, future = pending.popleft()
            yield EncodedChunk(chunk, future.result())
    except BrokenProcessPool:
        raise ChildProcessError(
            "a tokenising process died (out of memory? or a script without `if __name__ == '__main__':`?); "
            "run the same again to continue, with workers=1 if it repeats"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; only the calling one shall act on it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if previous is None else previous)


def _chunks(documents: Iterable[CorpusDocument]) -> Iterator[list[CorpusDocument]]:
    chunk: list[CorpusDocument] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.size
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Encoder:
    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self._limit = tokenizer.vocab_size

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray]:
        encoded: list[npt.NDArray] = []
        for ids in self._tokenizer.encode_batch(texts, bos=False):
            wide = np.array([*ids, self._tokenizer.eos_id], np.int64)
            if (largest := int(wide.max())) >= self._limit:
                raise ValueError(
                    f"the tokenizer gave token id {largest}, outside its vocabulary of {self._limit} tokens; "
                    "its files do not belong together"
                )
            encoded.append(wide.astype(self._dtype))
        return encoded


_encoder: _Encoder | None = None  # of a worker process


def _start_worker(tokenizer: Tokenizer, dtype: np.dtype) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows inherits nothing
    end_with_parent()
    _encoder = _Encoder(tokenizer, dtype)


def _work(texts: list[str]) -> list[npt.NDArray]:
    if _encoder is None:
        raise RuntimeError("the worker process was not initialised")
    return _encoder.encode(texts)
