"""The sweep files of W&B and of Hydra: the same runs by either."""

from typing import Any

import pytest
import yaml

from minigpt.model import GPT
from tests.conftest import ROOT, composed


def of_wandb(name: str) -> dict[str, dict[str, Any]]:
    text = (ROOT / f"sweeps/{name}.yaml").read_text(encoding="utf-8")
    sweep = yaml.safe_load(text)
    assert f"experiment={name}" in sweep["command"]
    return sweep["parameters"]


def of_hydra(name: str) -> dict[str, list[Any]]:
    text = (ROOT / f"conf/experiment/{name}.yaml").read_text(encoding="utf-8")
    grid = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    return {
        key: [yaml.safe_load(v) for v in str(values).split(",")] for key, values in grid.items()
    }


@pytest.mark.parametrize("name", ["scaling", "scaling_seeds"])
def test_hydra_runs_the_same_sizes_with_no_account(name):
    assert of_hydra(name) == {"model": of_wandb(name)["model"]["values"]}
    assert list(of_wandb(name)) == ["model"]


def test_the_sizes_that_are_run_twice_are_those_under_two_million_parameters():
    sizes = {size: composed([f"model={size}"]).model for size in of_hydra("scaling")["model"]}
    small = [size for size, model in sizes.items() if GPT(model).n_parameters < 2e6]
    assert of_hydra("scaling_seeds")["model"] == small
    assert composed(["experiment=scaling"]).seed == 1
    assert composed(["experiment=scaling_seeds"]).seed == 2


def test_the_local_recipe_search_is_a_grid_inside_the_space_of_the_sweep():
    space, grid = of_wandb("recipe"), of_hydra("recipe")
    assert space.keys() == grid.keys()
    for name, values in grid.items():
        for value in map(float, values):
            if "values" in space[name]:
                assert value in space[name]["values"]
            else:
                assert space[name]["min"] <= value <= space[name]["max"]
            tried = composed(["experiment=recipe", f"{name}={value:g}", "name=x"])
            assert (tried.data.source, tried.data.valid) == ("tinystories_sample", "tuning")
    assert tried.trainer.n_validations == 10
