"""Recipes: one YAML file that says which model to train, on what, and how.

    model:                      # model_type and the fields of its configuration
      model_type: xlstm_lm
      embedding_dim: 192
    data:                       # DataSettings
      path: data/novels
      context_length: 256
    train:                      # TrainerConfig
      steps: 1000
    prompts: ["Once upon a time"]

Every field can be overridden on the command line by its dotted name: ``--train.steps 200``. Unknown fields
are refused with the nearest valid name. ``model.vocab_size`` may be left out: it is taken from the data.
"""

from __future__ import annotations

import copy
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openxlstm.checkpoint import Tokenizer
from openxlstm.config import config_from_dict, config_to_dict, read_mapping
from openxlstm.data import PackedLoader, TokenDataset
from openxlstm.inference import Generator
from openxlstm.models import LanguageModel, build_config, build_model
from openxlstm.runtime import atomic_write_text
from openxlstm.training import Trainer, TrainerConfig

OVERRIDE = re.compile(r"--([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)+)(?:=(.*))?", re.DOTALL)
SWITCHES = frozenset(f"train.{f.name}" for f in fields(TrainerConfig) if isinstance(f.default, bool))


@dataclass(frozen=True)
class DataSettings:
    """What to train on."""

    path: Path | None = None
    """Directory that `openxlstm data` prepared."""
    tokenizer: str | None = None
    """Tokenizer that the recipe was made for (a directory or hub id), for `openxlstm data --tokenizer`."""
    context_length: int = 512
    """Tokens in a training row; documents are packed into rows."""
    validation_context_length: int | None = None
    """Tokens in a validation row; None is the same as in training."""


@dataclass(frozen=True)
class Recipe:
    """A model, its data and its training."""

    model: dict[str, Any]
    """model_type and the fields of its configuration."""
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainerConfig = field(default_factory=TrainerConfig)
    prompts: tuple[str, ...] = ("",)
    """Beginnings that the samples during training continue."""

    def write(self, path: Path) -> None:
        """Write as YAML that :func:`read_recipe` reads back."""
        import yaml

        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, yaml.safe_dump(config_to_dict(self), sort_keys=False, allow_unicode=True))


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate ``--section.field value`` (or ``=value``) from the other arguments.

    Raises:
        ValueError: an override without a value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    words = deque(arguments)
    while words:
        word = words.popleft()
        match = OVERRIDE.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        name, value = match[1].replace("-", "_"), match[2]
        switch = name.replace(".no_", ".")
        if value is None and switch in SWITCHES:
            explicit = name == switch and words and words[0] in ("true", "false")
            overrides[switch] = words.popleft() if explicit else str(name == switch).lower()
            continue
        if value is None:
            value = words.popleft() if words else None
        if value is None or (value.startswith("--") and len(value) > 2):
            raise ValueError(f"--{name} needs a value, such as --{name} 100")
        overrides[name] = value
    return rest, overrides


def read_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe and apply overrides, whose values are written as in YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown field (the nearest name is suggested), or a value of the wrong type.
    """
    return make_recipe(read_mapping(path), overrides)


def make_recipe(values: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a mapping; see :func:`read_recipe`."""
    import yaml

    values = copy.deepcopy(dict(values))
    for name, text in (overrides or {}).items():
        *sections, last = name.split(".")
        target: Any = values
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                raise ValueError(f"--{name}: '{section}' is a value, not a section")
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"--{name}: cannot read the value {text!r}; write it as in YAML") from None
        if isinstance(target[last], int) and ":" in text:  # YAML 1.1 counts in sixties
            raise ValueError(
                f"--{name}: YAML reads {text} as {target[last]}; quote it: --{name} '\"{text}\"'"
            )
    recipe = config_from_dict(Recipe, values)
    size = recipe.model.get("vocab_size")
    with_vocabulary = {**recipe.model, "vocab_size": 2 if size is None else size}
    build_config(with_vocabulary, where="model.")  # so that a wrong field is found before any data is read
    return recipe


def build_trainer(recipe: Recipe, *, resume_hint: str) -> tuple[Trainer, Recipe]:
    """The trainer of a recipe, with a freshly initialised model.

    Returns:
        the trainer, and the recipe with what was filled in (``model.vocab_size``) and an absolute data path,
        so that a run can be resumed from anywhere.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: no data named, or settings that do not fit the data or each other.
    """
    if recipe.data.path is None:
        raise ValueError(
            "the recipe names no data; prepare some with `openxlstm data` and give --data.path DIRECTORY"
        )
    dataset = TokenDataset.open(recipe.data.path)
    recipe = replace(recipe, data=replace(recipe.data, path=recipe.data.path.absolute()))
    if recipe.model.get("vocab_size") is None:
        recipe = replace(recipe, model={**recipe.model, "vocab_size": dataset.vocab_size})
    config = build_config(recipe.model, where="model.")
    train = recipe.train
    loader = PackedLoader(
        dataset,
        batch_size=train.batch_size,
        context_length=recipe.data.context_length,
        seed=train.seed,
        vocab_size=config.vocab_size,
    )
    tokenizer = dataset.tokenizer()
    torch.manual_seed(train.seed)
    trainer = Trainer(
        build_model(config),
        train,
        loader,
        _validation_loader(recipe, config.vocab_size),
        tokenizer,
        sampler(tokenizer, recipe.prompts, train.seed),
        resume_hint=resume_hint,
    )
    trainer.check()
    return trainer, recipe


def _validation_loader(recipe: Recipe, vocab_size: int) -> PackedLoader | None:
    """Held-out text in order, if the data has any."""
    path = recipe.data.path
    if path is None or not TokenDataset.open(path).manifest.validation.shards:
        return None
    length = recipe.data.validation_context_length or recipe.data.context_length
    rows = max(1, recipe.train.batch_size * recipe.data.context_length // length)
    dataset = TokenDataset.open(path, "validation")
    return PackedLoader(
        dataset, batch_size=rows, context_length=length, order="sequential", vocab_size=vocab_size
    )


def sampler(
    tokenizer: Tokenizer, prompts: Sequence[str], seed: int, max_new_tokens: int = 64
) -> Callable[[nn.Module, int], list[str]]:
    """What the trainer calls for samples of text: each prompt with its continuation, on one line each."""

    def sample(model: LanguageModel, step: int) -> list[str]:
        generator = Generator(model, tokenizer)
        texts = generator.generate(list(prompts), seed=seed, max_new_tokens=max_new_tokens)
        return [repr(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]

    return sample  # pyright: ignore[reportReturnType]
