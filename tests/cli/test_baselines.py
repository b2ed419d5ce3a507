"""The demo's baselines: a proper probability distribution, known compression."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest

from openxlstm.cli.baselines import ByteNGram, gzip_bits_per_byte, xz_bits_per_byte

TEXT = [b"the cat sat on the mat. the dog sat on the log.", b"a cat and a dog", b"\x00\xff\x00"]


@pytest.mark.parametrize("order", [1, 2, 5, 7])
def test_probabilities_sum_to_one(order: int) -> None:
    model = ByteNGram(TEXT, order)
    for context in (b"", b"the ", b"zzzz", b"\xff"):
        base = model.bits_per_byte([context]) * len(context) if context else 0.0
        bits = [model.bits_per_byte([context + bytes([b])]) * (len(context) + 1) - base for b in range(256)]
        assert sum(2.0**-b for b in bits) == pytest.approx(1.0, abs=1e-9)


def test_unseen_bytes_have_a_probability() -> None:
    assert math.isfinite(ByteNGram(TEXT).bits_per_byte([bytes(range(256))]))


def test_context_helps() -> None:
    text = [b"abcd" * 500]
    assert ByteNGram(text, 5).bits_per_byte(text) < 0.05 < ByteNGram(text, 1).bits_per_byte(text)


def test_random_bytes_cost_eight_bits() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8).tobytes()
    assert 7.9 < ByteNGram([noise[:20_000]]).bits_per_byte([noise[20_000:]]) < 8.3


def test_contexts_do_not_cross_documents() -> None:
    model = ByteNGram(TEXT)
    together = model.bits_per_byte(TEXT) * sum(map(len, TEXT))
    assert together == pytest.approx(sum(model.bits_per_byte([t]) * len(t) for t in TEXT))


@pytest.mark.parametrize(("documents", "order"), [([], 5), ([b""], 5), (TEXT, 0), (TEXT, 8)])
def test_impossible_models_are_refused(documents: list[bytes], order: int) -> None:
    with pytest.raises(ValueError, match="n-gram"):
        ByteNGram(documents, order)


def test_compressors() -> None:
    text = b"".join(TEXT) * 20
    assert gzip_bits_per_byte(TEXT * 20) == 8 * len(gzip.compress(text, 9)) / len(text)
    assert 0 < xz_bits_per_byte(TEXT * 20) < 8
