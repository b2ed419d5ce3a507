"""Tokenizers: text to token ids and back, also piece by piece while a model writes.

A :class:`Tokenizer` wraps a ``tokenizers.Tokenizer`` and fixes what language models here rely on:

- **Beginning of sequence.** Training sequences start with the document separator, in the published models
  ``<|endoftext|>`` with id 0 (both bos and eos); without it their output is garbage. ``encode`` therefore
  prepends it unless told otherwise.
- **Text is text.** A document that contains the characters ``<|endoftext|>`` does not inject a separator;
  special tokens written in a text are parsed only on request.
- **Streaming.** ``stream_decoder()`` turns ids into text as they arrive. Concatenated, the pieces equal the
  full decode, a piece never ends inside a character, and the total cost is linear.

Directories are those of Hugging Face: ``tokenizer.json`` and ``tokenizer_config.json``.
"""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from openxlstm.config import read_mapping

END_OF_TEXT = "<|endoftext|>"
"""Document separator: beginning and end of a sequence in all published models (id 0)."""


class StreamDecoder(Protocol):
    """Turns token ids into text one at a time."""

    def push(self, token_id: int) -> str:
        """Take one more id; return the text that is now certain, possibly empty."""
        ...

    def flush(self) -> str:
        """End the stream; return what was held back. The decoder is then as new."""
        ...


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: the ``tokenizers.Tokenizer`` that does the work; it is kept, not copied.
        bos, eos, pad: the special tokens, as text. Must be in the vocabulary; ``None`` if there is none.
        add_bos: whether ``encode`` prepends ``bos`` by default.

    Raises:
        ValueError: a special token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = END_OF_TEXT,
        eos: str | None = END_OF_TEXT,
        pad: str | None = None,
        add_bos: bool = True,
    ) -> None:
        for role, token in (("bos", bos), ("eos", eos), ("pad", pad)):
            if token is not None and backend.token_to_id(token) is None:
                raise ValueError(f"{role} token {token!r} is not in the tokenizer's vocabulary")
        self.backend = backend
        self.bos, self.eos, self.pad = bos, eos, pad
        self.add_bos = add_bos and bos is not None
        backend.encode_special_tokens = True

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, bos={self.bos!r}, eos={self.eos!r}, pad={self.pad!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        names = ("bos", "eos", "pad", "add_bos")
        return {"backend": self.backend.to_str()} | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state.pop("backend")), **state)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included. A model's vocabulary may be padded to more."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Id of the token every sequence begins with."""
        return None if self.bos is None else self.backend.token_to_id(self.bos)

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a document."""
        return None if self.eos is None else self.backend.token_to_id(self.eos)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, ``None`` if there is none."""
        return None if self.pad is None else self.backend.token_to_id(self.pad)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``decode`` leaves out by default."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def _parsing_backend(self) -> tokenizers.Tokenizer:
        """A copy that recognises special tokens in text."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def encode(self, text: str, *, bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: any string.
            bos: prepend the beginning-of-sequence token; ``None``: as the tokenizer's ``add_bos`` says.
            parse_special: read special tokens written in ``text`` as such (for prompt templates).

        Raises:
            ValueError: ``text`` is not a valid Unicode string, or ``bos=True`` without such a token.
        """
        return self.encode_batch([text], bos=bos, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool | None = None, parse_special: bool = False
    ) -> list[list[int]]:
        """:meth:`encode` for several texts, in parallel threads of the tokenizers library."""
        if bos and self.bos is None:
            raise ValueError("this tokenizer has no beginning-of-sequence token; call encode with bos=False")
        backend = self._parsing_backend if parse_special else self.backend
        try:
            if len(texts) == 1:
                encodings = [backend.encode(texts[0], add_special_tokens=False)]
            else:
                encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            wrong = next((t for t in texts if not _is_unicode(t)), None)
            raise ValueError(f"cannot tokenize {wrong!r:.60}: not a string of valid Unicode") from None
        prefix = [self.bos_id] if (self.add_bos if bos is None else bos) else []
        return [[*prefix, *encoding.ids] for encoding in encodings]  # pyright: ignore[reportReturnType]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``. Ids outside the vocabulary give nothing, invalid UTF-8 gives U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream_decoder(self, *, skip_special: bool = True) -> StreamDecoder:
        """A fresh decoder for one sequence of ids; see :class:`StreamDecoder`."""
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            return _ByteStreamDecoder(self, skip_special)
        return _WindowStreamDecoder(self, skip_special)

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        """Bytes of the tokens met so far (byte-level vocabularies)."""
        return {}

    def piece(self, token_id: int) -> bytes:
        """The bytes that one id of a byte-level vocabulary stands for; empty for an unknown id."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = self.backend.id_to_token(token_id) or ""
            try:
                piece = bytes(_CHARACTER_TO_BYTE[c] for c in token)
            except KeyError:  # an added token, stored as plain text
                piece = token.encode()
            self._pieces[token_id] = piece
        return piece

    def to_json(self) -> str:
        """The whole tokenizer as the text of a ``tokenizer.json``. Equal texts mean equal tokenizers."""
        backend = copy.deepcopy(self.backend)
        if self.add_bos and self.bos is not None:  # so that other programs prepend it too
            backend.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A",
                pair=f"{self.bos} $A {self.bos} $B",
                special_tokens=[(self.bos, backend.token_to_id(self.bos))],
            )
        return backend.to_str()

    def files(self) -> dict[str, str]:
        """Name and content of the files that :meth:`save` writes."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
        }
        tokens = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        config |= {name: token for name, token in tokens.items() if token is not None}
        return {
            "tokenizer.json": self.to_json(),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers`` reads as well."""
        from openxlstm.runtime import atomic_write_text

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            atomic_write_text(directory / name, text)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.

        Args:
            path: a directory with ``tokenizer.json`` or such a file; ``tokenizer_config.json`` and
                ``special_tokens_map.json`` beside it are used if present.

        Raises:
            FileNotFoundError: there is no ``tokenizer.json``.
            ValueError: the file is damaged or is not a tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at '{file}'")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"'{file}' is not a readable tokenizer: {error}") from None
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (file.parent / name).is_file():
                settings |= read_mapping(file.parent / name)
        tokens = {role: _token_text(settings.get(f"{role}_token")) for role in ("bos", "eos", "pad")}
        tokens = {r: t if t and backend.token_to_id(t) is not None else None for r, t in tokens.items()}
        if backend.token_to_id(END_OF_TEXT) is not None:
            tokens |= {role: tokens[role] or END_OF_TEXT for role in ("bos", "eos")}
        if tokens["pad"] is None and backend.token_to_id("<|padding|>") is not None:
            tokens["pad"] = "<|padding|>"
        return cls(backend, **tokens, add_bos=bool(settings.get("add_bos_token", True)))


class _ByteStreamDecoder:
    """Byte-level vocabularies: every id is a byte string, and UTF-8 is decoded incrementally."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.piece(token_id))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _WindowStreamDecoder:
    """Any other vocabulary: decode the last few ids again with each new one and emit what was added.

    Spacing can depend on the previous ids, so a window of already emitted ids stays in front. The window is
    bounded: a run that never becomes valid text is given out as it stands.
    """

    LONGEST_CHARACTER = 16

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._emitted: list[int] = []
        self._pending: list[int] = []

    def _added(self) -> str:
        before = self._tokenizer.decode(self._emitted, skip_special=self._skip_special)
        after = self._tokenizer.decode(self._emitted + self._pending, skip_special=self._skip_special)
        return after[len(before) :]

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._added()
        if not text or (text.endswith("\ufffd") and len(self._pending) < self.LONGEST_CHARACTER):
            if len(self._pending) >= self.LONGEST_CHARACTER:
                del self._pending[:]
            return ""
        self._emitted, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        text = self._added()
        self._emitted, self._pending = [], []
        return text


def train_bpe(texts: Iterable[str] | Iterator[str], vocab_size: int, *, progress: bool = False) -> Tokenizer:
    """Train a byte-level byte-pair tokenizer. Deterministic: the same texts give the same tokenizer.

    Args:
        texts: the training text, in pieces of any length; read once.
        vocab_size: number of tokens to reach, at least 257 (the separator and all bytes); a corpus with too
            few repetitions gives fewer.
        progress: show the tokenizers library's progress bars.

    Returns:
        a tokenizer that represents every string exactly, with ``<|endoftext|>`` (bos and eos) as id 0.

    Raises:
        ValueError: ``vocab_size`` is too small or there is no text.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if characters == 0:
        raise ValueError("cannot train a tokenizer: there is no text")
    return Tokenizer(backend)


def byte_tokenizer() -> Tokenizer:
    """The tokenizer without training: ``<|endoftext|>`` is id 0 and byte b is id b + 1 (257 tokens)."""
    vocabulary = {END_OF_TEXT: 0} | {c: b + 1 for c, b in _CHARACTER_TO_BYTE.items()}
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _byte_alphabet() -> dict[str, int]:
    """The GPT-2 alphabet of byte-level vocabularies: character to byte.

    Printable Latin-1 bytes are written as themselves, the others, in order, as the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in range(256) if b in printable}
    return alphabet | {chr(0x100 + n): b for n, b in enumerate(others)}


_CHARACTER_TO_BYTE = _byte_alphabet()


def _token_text(token: Any) -> str | None:
    """Special tokens are stored as text or as a mapping with the text under ``content``."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _is_unicode(text: Any) -> bool:
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return True
