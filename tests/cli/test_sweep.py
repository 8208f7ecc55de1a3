"""The sweep files of W&B and of Hydra, which describe the same runs."""

from typing import Any

import pytest
import yaml

from minigpt.model import GPT
from tests.conftest import ROOT, composed


def wandb_parameters(name: str) -> dict[str, dict[str, Any]]:
    text = (ROOT / f"sweeps/{name}.yaml").read_text(encoding="utf-8")
    sweep = yaml.safe_load(text)
    assert f"experiment={name}" in sweep["command"]
    return sweep["parameters"]


def hydra_grid(name: str) -> dict[str, list[Any]]:
    text = (ROOT / f"conf/experiment/{name}.yaml").read_text(encoding="utf-8")
    grid = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    return {
        key: [yaml.safe_load(v) for v in str(values).split(",")] for key, values in grid.items()
    }


@pytest.mark.parametrize("name", ["scaling", "scaling_seeds"])
def test_scaling_sweeps_of_hydra_and_wandb_have_the_same_sizes(name):
    assert hydra_grid(name) == {"model": wandb_parameters(name)["model"]["values"]}
    assert list(wandb_parameters(name)) == ["model"]


def test_scaling_seeds_has_the_five_smallest_sizes():
    sizes = {size: composed([f"model={size}"]).model for size in hydra_grid("scaling")["model"]}
    smallest = sorted(sizes, key=lambda size: GPT(sizes[size]).n_parameters)[:5]
    assert hydra_grid("scaling_seeds")["model"] == smallest
    assert composed(["experiment=scaling"]).seed == 1
    assert composed(["experiment=scaling_seeds"]).seed == 2


def test_recipe_grid_lies_inside_the_space_of_the_sweep():
    space, grid = wandb_parameters("recipe"), hydra_grid("recipe")
    assert space.keys() == grid.keys()
    for name, values in grid.items():
        for value in map(float, values):
            if "values" in space[name]:
                assert value in space[name]["values"]
            else:
                assert space[name]["min"] <= value <= space[name]["max"]
            config = composed(["experiment=recipe", f"{name}={value:g}", "name=x"])
            assert (config.data.source, config.data.valid) == ("tinystories_sample", "tuning")
    assert config.trainer.n_validations == 10
