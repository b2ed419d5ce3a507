"""llama.cpp through `llama-cpp-python`'s low-level calls, so that Python costs it next to nothing.

A Llama of the same number of parameters with random weights, keys and values in float16, flash attention as
llama.cpp decides, logits of the last token only. What stands in the cache before decoding was really read,
once, and is kept in a file.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as cpp

from openxlstm.models.accounting import least_prompt_flops
from runtimes import gguf_file
from runtimes.sizes import LLAMAS
from turns import Work

ROOM = 1024
"""Tokens of a cache beyond the context: more than a turn can write."""


class Model:
    """A model from a GGUF file, which is written unless it is there."""

    def __init__(self, size: str, dtype: str, threads: int) -> None:
        self.shape, self.kind, self.threads = LLAMAS[size], dtype, threads
        path = gguf_file.write(self.shape, dtype)
        self._silence = cpp.llama_log_callback(lambda level, text, data: None)
        cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        cpp.llama_backend_init()
        self.model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")

    def decode(self, context: int, batch: int) -> Work:
        """Steps of ``batch`` sequences after ``context`` tokens."""
        run = _Context(self, context + ROOM, batch)
        run.fill(context)
        numbers = self.shape.weights * gguf_file.BITS[self.kind] / 8
        numbers += 2 * batch * context * self.shape.cache_numbers
        return Work(run.step, batch, lambda: run.restart(context), bytes=int(numbers))

    def prompt(self, length: int) -> Work:
        """A prompt in pieces of its default size, 2,048 (512 at a time within them)."""
        run = _Context(self, length + 256, 1)

        def read(length: int = length) -> None:
            run.restart(0)
            run.read(length)

        read(130)
        return Work(read, length, flops=least_prompt_flops(self.shape.config, length))


class _Context:
    """A cache with room for ``batch`` sequences of ``length`` tokens."""

    def __init__(self, owner: Model, length: int, batch: int) -> None:
        parameters = cpp.llama_context_default_params()
        parameters.n_ctx = length * batch
        parameters.n_seq_max = batch
        parameters.n_threads = parameters.n_threads_batch = owner.threads
        self.owner, self.batch, self.position = owner, batch, 0
        self.context: Any = cpp.llama_init_from_model(owner.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot open a context of {parameters.n_ctx} tokens")
        self.memory = cpp.llama_get_memory(self.context)
        self.piece = int(cpp.llama_n_batch(self.context))
        self.tokens = cpp.llama_batch_init(max(batch, self.piece), 0, 1)

    def _run(self, count: int) -> None:
        self.tokens.n_tokens = count
        code = cpp.llama_decode(self.context, self.tokens)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        cpp.llama_synchronize(self.context)

    def _put(self, index: int, position: int, sequence: int, logits: bool) -> None:
        batch = self.tokens
        batch.token[index], batch.pos[index] = (7 * position + 5) % 50000, position
        batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, sequence, logits

    def step(self) -> None:
        """A token for every sequence."""
        for sequence in range(self.batch):
            self._put(sequence, self.position, sequence, True)
        self._run(self.batch)
        self.position += 1

    def read(self, length: int) -> None:
        """Tokens of the first sequence, with the logits of the last."""
        for start in range(0, length, self.piece):
            count = min(self.piece, length - start)
            for index in range(count):
                self._put(index, start + index, 0, start + index == length - 1)
            self._run(count)
        self.position = length

    def restart(self, position: int) -> None:
        """Forget what came after ``position``."""
        for sequence in range(self.batch):
            cpp.llama_memory_seq_rm(self.memory, sequence, position, -1)
        self.position = position

    def fill(self, length: int) -> None:
        """Read ``length`` tokens into every sequence, or take them from the file of an earlier time."""
        if not length:
            return
        shape = self.owner.shape
        path = gguf_file.directory() / f"cache-{shape.width}-{shape.layers}-{length}.state"
        if not path.exists():
            self.read(length)
            partial = path.with_suffix(".partial")
            marker = (cpp.llama_token * 1)(0)
            cpp.llama_state_seq_save_file(self.context, str(partial).encode(), 0, marker, 1)
            partial.replace(path)
        token, count = (cpp.llama_token * 1)(), ctypes.c_size_t()
        for sequence in range(self.batch):
            size = cpp.llama_state_seq_load_file(
                self.context, str(path).encode(), sequence, token, 1, ctypes.byref(count)
            )
            if not size:
                raise RuntimeError(f"llama.cpp cannot load {path}; delete it")
        self.position = length
