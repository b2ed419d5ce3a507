"""``openxlstm train``: run a recipe, or resume a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from openxlstm.cli.advice import say_if_slow
from openxlstm.cli.options import parse
from openxlstm.cli.recipe import DataSettings, Recipe, build_trainer, read_recipe, take_overrides
from openxlstm.config import config_to_dict
from openxlstm.training import TrainerConfig

EXAMPLES = """\
  openxlstm data novels/ --output data/novels
  openxlstm train recipes/xlstm_160m.yaml --data.path data/novels --train.steps 2000
  openxlstm train runs/xlstm_160m/recipe.yaml --resume
  openxlstm train recipes/xlstm_160m.yaml --check        (what would be trained, without training)"""


@dataclass(frozen=True)
class TrainOptions:
    """Train a language model from a recipe.

    A recipe is a YAML file with the sections model, data and train. Any of its fields can be given here by
    its dotted name; values are written as in YAML. The run directory (--train.output) receives the log, the
    loss curve, checkpoints, the model and the recipe as it was used. Ctrl-C saves and says how to resume.
    """

    recipe: Annotated[Path, Positional, arg(metavar="RECIPE.yaml")]
    """The recipe."""
    resume: bool = False
    """Continue from the latest checkpoint in the output directory."""
    check: bool = False
    """Only build the model and the data, say how large they are, and stop."""


@dataclass(frozen=True)
class _Help(TrainOptions):
    __doc__ = TrainOptions.__doc__

    data: DataSettings = field(default_factory=DataSettings)
    train: TrainerConfig = field(default_factory=TrainerConfig)


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    rest, overrides = take_overrides(arguments)
    wants_help = bool({"-h", "--help"} & set(rest))
    options = parse(_Help if wants_help else TrainOptions, rest, command="train", examples=EXAMPLES)
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"one process trains, torchrun started {processes}: use --nproc-per-node 1, or share the runs of "
            "a study with `torchrun ... -m openxlstm.cli scaling sweep DIRECTORY`"
        )
    recipe = read_recipe(options.recipe, overrides)
    if options.resume and "train.output" not in overrides:
        recipe = in_its_run(recipe, options.recipe.parent)
    output = recipe.train.output
    again = shlex.join(["openxlstm", "train", str(output / "recipe.yaml"), "--resume"])
    trainer, recipe = build_trainer(recipe, resume_hint=f"resume with `{again}`")
    if options.check:
        print(describe(trainer, recipe))
        return 0
    if options.resume and not trainer.checkpoints.paths():
        raise FileNotFoundError(f"'{output}' holds no checkpoint to resume; train without --resume first")
    if trainer.rank == 0:
        say_if_slow(trainer.device)
    result = trainer.fit(resume=options.resume, on_start=lambda: recipe.write(output / "recipe.yaml"))
    line = f"trained {result.step} steps on {result.tokens:,} tokens in {result.seconds:.0f} s"
    if result.bits_per_byte is not None:
        line += f"; {result.bits_per_byte:.3f} bits per byte on held-out text"
    print(f"{line}\nmodel: {result.model_directory}    curve: {output / 'loss.png'}")
    print(f"try:   openxlstm generate {result.model_directory} 'your prompt'")
    return 0


def in_its_run(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe with ``directory``, where its file lies, as output, if that is the directory of a run."""
    if not (directory / "checkpoints").is_dir() and not (directory / "log.jsonl").is_file():
        return recipe
    return replace(recipe, train=replace(recipe.train, output=directory))


def describe(trainer: object, recipe: Recipe) -> str:
    """Sizes of model and data, for ``--check``."""
    from openxlstm.data import TokenDataset
    from openxlstm.models import build_config, parameter_count, state_bytes, training_flops_per_token

    config = build_config(recipe.model)
    dataset = TokenDataset.open(recipe.data.path or "")
    tokens = recipe.train.steps * recipe.train.batch_size * recipe.data.context_length
    flops = training_flops_per_token(config, recipe.data.context_length)
    lines = [
        f"model       {recipe.model['model_type']}, {parameter_count(config):,} parameters, "
        f"{state_bytes(config, context_length=recipe.data.context_length) / 2**20:.1f} MiB of state per "
        "sequence",
        f"data        {len(dataset):,} tokens in {dataset.num_documents:,} documents",
        f"training    {recipe.train.steps:,} steps, {tokens:,} tokens ({tokens / len(dataset):.2f} passes), "
        f"{tokens * flops:.2e} FLOPs",
        f"output      {recipe.train.output}",
    ]
    changed = {
        name: value
        for name, value in config_to_dict(recipe.train).items()
        if value != config_to_dict(TrainerConfig())[name] and name != "output"
    }
    lines.append(
        f"settings    {', '.join(f'{name}={value}' for name, value in changed.items()) or 'defaults'}"
    )
    return "\n".join(lines)
