"""Settings of a training: their limits, and the schedule that follows from them."""

import pytest

from minigpt.cli.compose import load_config
from minigpt.core.settings import UserError, plain
from minigpt.runs.records import read_metrics
from minigpt.training.config import OptimizerConfig, Schedule, TrainConfig
from tests.conftest import composed, naming, trained_folder


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"lr": 0.0}, ["lr", "0.0"]),
        ({"matrix_lr": -1.0}, ["matrix_lr", "-1.0"]),
        ({"name": "adamw", "matrix_lr": 1e-3}, ["matrix_lr", "adamw"]),
        ({"beta2": 1.0}, ["beta2", "1.0"]),
        ({"momentum": 1.5}, ["momentum", "1.5"]),
        ({"weight_decay": -0.1}, ["weight_decay", "-0.1"]),
        ({"final_weight_decay": -0.1}, ["final_weight_decay", "-0.1"]),
        ({"name": "adamw", "normalize_rows": "after"}, ["normalize_rows", "after"]),
        ({"final_lr": 2.0}, ["final_lr", "2.0"]),
    ],
)
def test_optimizer_settings_out_of_range_are_named(settings, names):
    with pytest.raises(ValueError, match=naming(*names)):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "n_steps", "fix"),
    [
        ({"cycle_share": 0.01, "cycles": 2}, 20, {"optimizer.cycle_share": 0.0501}),
        (
            {"cycle_share": 0.01, "cycles": 40},
            20,
            {"optimizer.cycles": 9, "optimizer.cycle_share": 0.0501},
        ),
        ({"cycle_share": 0.1, "cycles": 9}, 20, {"optimizer.warmup_steps": 0}),
        ({"cycle_share": 0.3, "cycles": 2, "warmup_steps": 50}, 100, {"optimizer.warmup_steps": 4}),
    ],
)
def test_cycles_that_do_not_fit_the_budget_name_settings_that_do(
    settings: dict, n_steps: int, fix: dict[str, float]
):
    config = composed([f"budget.tokens={n_steps * 32 * 256}", "data.batch_size=32"])
    values = {"warmup_steps": 2} | settings

    def schedule(optimizer: dict) -> Schedule:
        parts = {"optimizer": OptimizerConfig(**optimizer), "data": config.data}
        return Schedule.from_config(TrainConfig(budget=config.budget, **parts), 1)

    with pytest.raises(UserError) as error:
        schedule(values)
    assert error.value.fix == fix
    fixed = {name.removeprefix("optimizer."): value for name, value in error.value.fix.items()}
    assert schedule(values | fixed).n_steps == n_steps


@pytest.mark.parametrize(("cycles", "share"), [(2, 0.5), (3, 0.34), (5000, 0.5)])
def test_cycles_that_take_the_whole_run_are_refused_with_a_share_that_fits(
    cycles: int, share: float
):
    with pytest.raises(UserError, match=naming("cycles", "cycle_share")) as error:
        OptimizerConfig(cycles=cycles, cycle_share=share)
    fixed = OptimizerConfig(cycles=cycles, **error.value.fix)
    assert 0 < fixed.decay_ends(10**6)[0] < 10**6


def test_fsdp_refuses_cycles_and_snapshots():
    fsdp = ["trainer.strategy=fsdp", "callbacks=quiet", "optimizer=adamw"]
    for typed, name in (("optimizer.cycles=1", "optimizer.cycles"),
                        ("callbacks.snapshots=3", "callbacks.snapshots")):  # fmt: skip
        with pytest.raises(UserError, match=naming("trainer.strategy", name)) as error:
            composed([*fsdp, typed])
        assert list(error.value.fix) == [name]


def test_warmup_in_tokens_takes_fewer_updates_with_larger_batches(tiny: list[str]):
    def lrs(**settings) -> list[float]:
        words = [f"{name}={value}" for name, value in settings.items()]
        folder = trained_folder([*tiny, "optimizer.warmup_tokens=300", *words])
        rows = [row for row in read_metrics(folder) if "lr" in row]
        return [row["lr"] / rows[4]["lr"] for row in rows[:5]]

    # Batches of 64 and of 128 tokens: the warm-up takes 5 and 3 updates.
    assert lrs(name="a") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    rising = lrs(**{"name": "b", "data.batch_size": 8})
    assert rising[0] < rising[1] < rising[2]
    assert rising[2] == pytest.approx(rising[3])  # the decay starts
    assert rising[3] > rising[4]


def test_settings_survive_a_round_trip_through_plain_values():
    config = load_config("train", ["model=w64", "optimizer=adamw"])
    assert TrainConfig.from_dict(plain(config)) == config
