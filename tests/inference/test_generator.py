"""Streaming and batches: equal to the plain model, independent of neighbours, bounded memory."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from torch import nn

from openxlstm.inference import Generator, SamplingConfig
from openxlstm.state import leaves

PROMPTS = ["", "User: how", "the quick brown fox jumps over naïve café 東京 and more", "x"]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "stop_at_eos": False}


@torch.inference_mode()
def greedy_by_full_forward(model: nn.Module, tokens: list[int], count: int) -> list[int]:
    """The definition: the whole text through the model for every new token."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(tokens) - count :]


def test_greedy_is_the_argmax_of_the_full_forward(model, bpe):
    generator = Generator(model, bpe, prefill_chunk=7)
    for prompt in PROMPTS:
        result = generator.complete(prompt, **GREEDY)
        assert result.prompt_tokens == bpe.encode(prompt, bos=True)
        assert result.tokens == greedy_by_full_forward(model, result.prompt_tokens, 12)
        assert result.text == bpe.decode(result.tokens)
        assert result.finish_reason == "length"


@pytest.mark.parametrize("name", ["large_e64_h2_b2", "large_bias_qk1_e32"])
def test_greedy_is_what_the_published_model_writes(golden, name):
    from openxlstm.config import config_from_dict
    from openxlstm.models import xLSTMLarge, xLSTMLargeConfig

    description, tensors = golden(name)
    model = xLSTMLarge(config_from_dict(xLSTMLargeConfig, description["config"]))
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("param.")})
    prompts = tensors["in.idx"][:, :5].tolist()
    results = Generator(model, None, prefill_chunk=3).complete(prompts, temperature=0, max_new_tokens=8)
    assert [r.tokens for r in results] == tensors["f32.generate_from_first5_greedy8"].tolist()


def test_logprobs_are_the_models(model, bpe):
    result = Generator(model, bpe).complete("User:", max_new_tokens=6, temperature=2.0, top_k=5, seed=1)
    tokens = torch.tensor([result.prompt_tokens + result.tokens])
    with torch.inference_mode():
        logprobs = model(tokens)[0].log_softmax(-1)
    start = len(result.prompt_tokens)
    expected = [float(logprobs[start - 1 + n, t]) for n, t in enumerate(result.tokens)]
    assert result.logprobs == pytest.approx(expected, abs=1e-3)


def test_batch_gives_what_each_gives_alone(model, bpe):
    generator = Generator(model, bpe)
    together = generator.complete(PROMPTS, **GREEDY)
    alone = [generator.complete(prompt, **GREEDY) for prompt in PROMPTS]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert generator.generate(PROMPTS, **GREEDY) == [generator.generate(p, **GREEDY) for p in PROMPTS]
    grouped = Generator(model, bpe, max_batch_size=3).complete(PROMPTS, **GREEDY)
    assert [r.tokens for r in grouped] == [r.tokens for r in alone]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "top_p": 0.9, "seed": 4}])
def test_row_does_not_depend_on_the_others_content(model, bpe, sampling):
    """Bit for bit, whatever the others say, how long they are and when they end."""
    generator = Generator(model, bpe)
    eos = [{"stop_at_eos": True}, {"stop_at_eos": False}, {"stop": ("e", "a", "u")}]
    mine = "User: how are you?"
    seen = set()
    for others in (["bye", "the"], ["brown fox " * 9, "東"], [mine, mine]):
        for end in eos:
            configs = [SamplingConfig(max_new_tokens=16, **sampling)]
            configs += [SamplingConfig(max_new_tokens=16, **sampling, **end) for _ in others]
            result = generator.complete([mine, *others], configs)[0]
            seen.add((tuple(result.tokens), tuple(result.logprobs), result.text))
    assert len(seen) == 1


def test_half_precision_rows_are_independent_too(make_model, bpe):
    generator = Generator(make_model("xlstm_large").to(torch.bfloat16), bpe)
    options = {"temperature": 0, "max_new_tokens": 5, "stop_at_eos": False}
    first, second = (generator.complete(["User:", other], **options)[0] for other in ("bye", "brown"))
    assert first == first.__class__(**(second.__dict__ | {"seed": first.seed}))
    assert len(first.tokens) == 5


def test_rows_with_less_to_write_leave(model, bpe):
    generator = Generator(model, bpe)
    rows: list[int] = []
    step = model.step

    def counting(tokens, state):
        rows.append(len(tokens))
        return step(tokens, state)

    model.step = counting
    options = {"temperature": 0, "stop_at_eos": False}
    configs = [SamplingConfig(max_new_tokens=n, **options) for n in (5, 0, 2)]
    results = generator.complete(["a", "b", "c"], configs)
    assert rows == [2, 2, 1, 1, 1]
    assert [len(r.tokens) for r in results] == [5, 0, 2]
    del model.step
    alone = generator.complete("a", configs[0])
    assert results[0].tokens == alone.tokens


def test_several_samples_of_one_prompt(model, bpe):
    generator = Generator(model, bpe)
    configs = [SamplingConfig(seed=seed, max_new_tokens=10, temperature=1.0) for seed in (1, 2, 1)]
    results = generator.complete(["User:"] * 3, configs)
    assert results[0].tokens == results[2].tokens != results[1].tokens
    assert [r.seed for r in results] == [1, 2, 1]


def test_seed_repeats_and_free_seed_is_reported(model, bpe):
    generator = Generator(model, bpe)
    first = generator.complete("User:", max_new_tokens=10, temperature=1.2)
    assert generator.complete("User:", max_new_tokens=10, temperature=1.2, seed=first.seed) == first
    assert (
        "".join(generator.stream("User:", max_new_tokens=10, temperature=1.2, seed=first.seed)) == first.text
    )


def test_prefill_in_pieces_is_one_forward(model, bpe):
    tokens = bpe.encode("the quick brown fox jumps over the lazy dog. " * 12)
    with torch.inference_mode():
        logits, state = model(torch.tensor([tokens]), return_state=True)
    for chunk in (1, 16, 37, 10_000):
        session = Generator(model, bpe, prefill_chunk=chunk).start(tokens)
        assert session.consumed == len(tokens) - 1
        last, after = session.runner.step(tokens[-1:], session.state)
        torch.testing.assert_close(last, logits[:, -1], rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(leaves(after), leaves(state), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_memory_is_constant(model, bpe):
    """No call sees more than a piece of the prompt, and the state never grows."""
    seen: list[int] = []
    read = model.read

    def watching(tokens, *args, **kwargs):
        seen.append(tokens.shape[1])
        return read(tokens, *args, **kwargs)

    model.read = watching
    session = Generator(model, bpe, prefill_chunk=32).start([5] * 300)
    sizes = [tuple(leaf.shape) for leaf in leaves(session.state)]
    assert max(seen) == 32
    assert sum(seen) == 299
    session.generate(max_new_tokens=40, stop_at_eos=False)
    assert [tuple(leaf.shape) for leaf in leaves(session.state)] == sizes
    assert sum(seen) == 299


def test_stream_is_generate(model, bpe):
    generator = Generator(model, bpe)
    for options in (GREEDY, {"seed": 3, "temperature": 1.5, "max_new_tokens": 60}):
        pieces = list(generator.stream("User:", **options))
        assert all(pieces)
        assert "".join(pieces) == generator.generate("User:", **options)


def test_stop_strings_over_token_boundaries(scripted, byte_level):
    text = "one\n\nUser two"
    model = scripted([0, *byte_level.encode(text, bos=False)])
    generator = Generator(model, byte_level)
    options = {"temperature": 0, "max_new_tokens": len(text)}
    for stop, expected in (
        ("\n\nUser", "one"),
        ("\n\nBot", text),
        (("two!", "U"), "one\n\n"),
        (("User", "ser two"), "one\n\n"),
        ("two", "one\n\nUser "),
        ("o", ""),
    ):
        pieces = list(generator.stream("", stop=stop, **options))
        assert "".join(pieces) == expected
        result = generator.complete("", stop=stop, **options)
        assert result.text == expected
        assert result.finish_reason == ("length" if expected == text else "stop")


def test_end_of_text(scripted, byte_level):
    model = scripted([0, *byte_level.encode("ab", bos=False), 0, 5, 5, 5, 5])
    generator = Generator(model, byte_level)
    result = generator.complete("", temperature=0, stop=("bc",))
    assert (result.text, result.tokens, result.finish_reason) == ("ab", [98, 99], "eos")
    result = generator.complete("", temperature=0, stop_at_eos=False, max_new_tokens=4)
    assert (result.tokens, result.finish_reason) == ([98, 99, 0, 5], "length")


def test_unicode_streams_whole_characters(scripted, byte_level):
    text = "naïve 東京 🙂🙃é"
    tokens = byte_level.encode(text, bos=False)
    generator = Generator(scripted([0, *tokens]), byte_level)
    assert list(generator.stream("", temperature=0, max_new_tokens=len(tokens))) == list(text)
    cut_short = list(generator.stream("", temperature=0, max_new_tokens=len(tokens) - 1))
    assert "".join(cut_short) == text[:-1] + "\ufffd"


def test_repetition_penalty_counts_prompt_and_text_but_not_bos(scripted, byte_level):
    generator = Generator(scripted([0]), byte_level)  # always wants token 0: beginning and end of text
    assert generator.complete("hi", temperature=0, repetition_penalty=1e9).finish_reason == "eos"
    session = Generator(scripted([70]), byte_level).start("hi", temperature=0, max_new_tokens=2)
    session.generate()
    assert session.sampler.seen.nonzero().flatten().tolist() == [70, 1 + ord("h"), 1 + ord("i")]
    sampling = {"temperature": 0, "repetition_penalty": 2.0, "max_new_tokens": 3, "stop_at_eos": False}
    flat = scripted([70])
    flat.step = lambda tokens, state: (torch.arange(50.0, 53.0)[None, None], state)
    flat.vocab_size = 3
    assert Generator(flat, byte_level).complete([2], **sampling).tokens == [1, 0, 2]


def test_bos_is_prepended_unless_told_otherwise(model, bpe):
    generator = Generator(model, bpe)
    prompt = "User"
    plain = bpe.encode(prompt, bos=False)
    options: dict[str, Any] = {"max_new_tokens": 0}
    assert generator.complete(prompt, **options).prompt_tokens == [0, *plain]
    assert generator.complete(prompt, bos=False, **options).prompt_tokens == plain
    assert generator.complete(plain, **options).prompt_tokens == plain
    assert generator.complete(torch.tensor(plain), **options).prompt_tokens == plain
    assert generator.complete(plain, bos=True, **options).prompt_tokens == [0, *plain]
    assert generator.complete([0, *plain], bos=True, **options).prompt_tokens == [0, *plain]


def test_model_keeps_its_mode_and_the_global_random_state(model, bpe):
    model.train()
    inner = next(m for m in model.modules() if m is not model)
    inner.eval()
    before = torch.get_rng_state()
    modes: list[bool] = []
    embedding = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    embedding.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    iterator = Generator(model, bpe).stream("User: how are you", max_new_tokens=4, seed=1)
    next(iterator)
    assert set(modes) == {False}
    assert model.training
    assert not inner.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    loss = model(torch.tensor([[1, 2, 3]])).sum()
    loss.backward()  # what generation left behind does not stand in the way of training


def test_token_ids_without_a_tokenizer(model):
    generator = Generator(model, None)
    result = generator.complete([1, 2, 3], temperature=0, max_new_tokens=4)
    assert len(result.tokens) == 4
    assert result.text == ""
    with pytest.raises(ValueError, match="no tokenizer"):
        generator.generate([1, 2, 3])
    with pytest.raises(ValueError, match="pass the prompt as token ids"):
        generator.complete("text")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generator.complete([1], stop="x")


def test_wrong_input_is_refused_at_once(model, bpe):
    generator = Generator(model, bpe)
    with pytest.raises(ValueError, match="token id 330 at position 1 is out of range: the model has 330"):
        generator.stream([1, 330])
    with pytest.raises(ValueError, match="token id -1"):
        generator.complete([-1])
    with pytest.raises(ValueError, match="prompt is empty"):
        generator.stream("", bos=False)
    with pytest.raises(ValueError, match="prompt is empty"):
        generator.generate(["a", []])
    with pytest.raises(ValueError, match="Did you mean 'top_k'"):
        generator.stream("a", topk=3)
    with pytest.raises(ValueError, match="2 sampling configurations for 1 prompts"):
        generator.complete(["a"], [SamplingConfig(), SamplingConfig()])
    with pytest.raises(ValueError, match="a prompt is a text or a list of token ids"):
        generator.complete(5)  # pyright: ignore
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1"):
        Generator(model, bpe, prefill_chunk=0)
    with pytest.raises(ValueError, match="max_batch_size must be at least 1"):
        Generator(model, bpe, max_batch_size=0)
    with pytest.raises(ValueError, match="a Linear cannot generate text"):
        Generator(nn.Linear(2, 2), bpe)
    assert generator.generate([]) == []


def test_prompts_of_ids(model, bpe):
    generator = Generator(model, bpe)
    expected = generator.complete([[1, 2], [3]], **GREEDY)
    assert generator.complete((iter(ids) for ids in ([1, 2], [3])), **GREEDY) == [
        dataclasses.replace(result, seed=ANY) for result in expected
    ]
    one = generator.complete(iter(np.array([1, 2])), **GREEDY)
    assert one.tokens == expected[0].tokens
    assert "".join(generator.stream(iter([1, 2]), **GREEDY)) == one.text
    wrongs: list[Any] = [[1.7, 2.2], b"ab", [b"ab"], bytearray(b"ab"), 7, torch.tensor(7)]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"a prompt is a text or a list of token ids"):
            generator.complete(wrong, **GREEDY)
