"""Tiny models and tokenizers for the generation tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openxlstm.checkpoint.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from openxlstm.state import ElmanState, ModelState


class ScriptedModel(nn.Module):
    """Writes a given list of tokens: after n tokens of any kind the next one is ``script[n]``.

    Its state is the number of tokens read, so a test can see what the state has read.
    """

    def __init__(self, script: Sequence[int], vocab_size: int = 257) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("script", torch.tensor(list(script), dtype=torch.long))

    def initial_state(self, batch_size: int, device: Any = None) -> ModelState:
        return ModelState((ElmanState(torch.zeros(batch_size, 1, 1, device=device)),))

    def forward(self, tokens: Tensor, state: Any = None, *, return_state: bool = False) -> Any:
        state = state or self.initial_state(tokens.shape[0])
        count = state.blocks[0].h
        position = count[:, 0] + torch.arange(1, tokens.shape[1] + 1)
        following = self.script[position.long().clamp_max(len(self.script) - 1)]
        logits = 30 * nn.functional.one_hot(following, self.vocab_size).float()
        new = ModelState((ElmanState(count + tokens.shape[1]),))
        return (logits, new) if return_state else logits

    def read(self, tokens: Tensor, state: Any = None) -> Any:
        return self(tokens, state, return_state=True)[1]

    def step(self, tokens: Tensor, state: Any = None) -> Any:
        return self(tokens, state, return_state=True)


@pytest.fixture
def scripted() -> Callable[..., ScriptedModel]:
    return ScriptedModel


def count_read(state: ModelState) -> int:
    """How many tokens a :class:`ScriptedModel` has read."""
    return int(state.blocks[0].h[0, 0, 0])


@pytest.fixture
def tokens_read() -> Callable[[ModelState], int]:
    return count_read


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Id 0 is end of text, id b + 1 is byte b."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    text = (
        "User: how are you?\nAssistant: the quick brown fox jumps — naïve café 東京 🙂🙃\n\nUser: bye\n" * 30
    )
    return train_bpe([text], 330)


def build_model(kind: str, vocab_size: int = 330, seed: int = 0) -> nn.Module:
    from openxlstm.models import build_model

    shared = {"vocab_size": vocab_size, "embedding_dim": 32}
    if kind == "xlstm_lm":
        block = {"mlstm": {"mlstm": {"num_heads": 2}}, "slstm": {"slstm": {"num_heads": 2}}}
        config = shared | {
            "context_length": 64,
            "num_blocks": 2,
            "slstm_at": [1],
            "mlstm_block": block["mlstm"],
            "slstm_block": block["slstm"] | {"feedforward": {"proj_factor": 1.3, "act_fn": "gelu"}},
        }
    else:
        config = shared | {"num_heads": 2, "num_blocks": 2}
    generator = torch.Generator().manual_seed(seed)
    model = build_model({"model_type": kind} | config)
    model.reset_parameters(generator)
    with (
        torch.no_grad()
    ):  # livelier than a fresh initialisation, so that greedy texts do not repeat one token
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise if parameter.ndim < 2 else 0.6 * noise * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    return build_model


@pytest.fixture(params=["xlstm_lm", "xlstm_large"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny model of each architecture, the same every time."""
    return build_model(request.param)
