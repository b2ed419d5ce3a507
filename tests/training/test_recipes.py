"""Every recipe is a model, data and training settings that the package accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openxlstm.cli.recipe import read_recipe
from openxlstm.config import config_from_dict, read_mapping
from openxlstm.models import build_config, build_model, parameter_count
from openxlstm.training import TrainerConfig

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
PARAMETERS = {
    "xlstm_160m": 164_110_224, "xlstm_165m": 164_073_312, "xlstm_400m": 406_926_528,
    "xlstm_830m": 841_489_728, "xlstm_1.3b": 1_420_822_720, "xlstm_2.7b": 2_780_408_640,
    "xlstm_7b": 6_865_424_896, "neurips_125m_1_0": 163_800_000, "neurips_125m_7_1": 163_700_000,
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_into_configurations(path: Path) -> None:
    assert list(read_mapping(path))[:3] == ["model", "data", "train"]
    recipe = read_recipe(path)
    assert recipe.train.output.name == path.stem
    assert recipe.data.context_length >= 1
    assert recipe.data.tokenizer or path.stem == "demo"


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_published_sizes(name: str) -> None:
    config = build_config(read_mapping(RECIPES / f"{name}.yaml")["model"])
    assert parameter_count(config) == pytest.approx(PARAMETERS[name], rel=1e-3)
    with torch.device("meta"):
        model = build_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)


def test_the_demo_recipe_is_the_demos_model() -> None:
    from openxlstm.cli.demo import MODEL

    assert read_recipe(RECIPES / "demo.yaml").model == MODEL


def test_the_7b_recipe_is_the_published_one() -> None:
    recipe = read_mapping(RECIPES / "xlstm_7b.yaml")
    assert parameter_count(build_config(recipe["model"])) == 6_865_424_896
    config = config_from_dict(TrainerConfig, recipe["train"])
    assert config.steps * config.batch_size * recipe["data"]["context_length"] == pytest.approx(
        2.1e12, rel=0.01
    )
    assert (config.learning_rate, config.betas, config.eps, config.weight_decay) == (
        4e-4,
        (0.9, 0.95),
        1e-8,
        0.1,
    )
    assert (config.schedule, config.warmup, config.cooldown, config.clip) == ("exponential", 3000, 2000, 0.5)
