import dataclasses
import math

import pytest

from minigpt.core.settings import UserError
from minigpt.runs.provenance import Parent
from minigpt.scaling.comparison import compare, markdown
from tests.run_folder import SUMMARY, write_run
from tests.scaling.conftest import results


@pytest.fixture
def recipes(tmp_path):
    """Two recipes with three seeds each, and a third recipe with another seed."""
    losses = {("a", 1): 2.0, ("a", 2): 2.3, ("a", 3): 2.1, ("b", 1): 1.9, ("b", 2): 2.18}
    losses |= {("b", 3): 2.02, ("c", 4): 1.5}
    for (name, seed), loss in losses.items():
        summary = SUMMARY | {"val/loss": loss, "val/perplexity": math.exp(loss), "seconds": 100}
        folder = write_run(tmp_path / f"{name}{seed}", summary, seed=seed)
        decay = {"a": 0.1, "b": 0.4, "c": 0.4}[name]
        clipping = "\n  grad_clip: 2.0" if name == "c" else ""
        with (folder / "config.yaml").open("a") as file:
            file.write(f"optimizer:\n  weight_decay: {decay}{clipping}\n")
    return tmp_path


def test_comparison_pairs_runs_by_seed_and_gives_a_standard_error(recipes):
    first, second, third = compare(results(recipes))
    assert first.change == ""
    assert (first.difference, first.standard_error, first.shown) == (None, None, None)
    assert second.change == "optimizer.weight_decay=0.4"
    assert second.difference == pytest.approx(-0.1)
    assert second.standard_error == pytest.approx(0.02 / math.sqrt(3))  # of -0.1, -0.12, -0.08
    assert second.shown is True
    assert second.seconds == 100
    assert (third.losses, third.difference, third.shown) == ({4: 1.5}, None, None)
    assert "optimizer.grad_clip=2.0" in third.change
    for number in ("-0.1000", "0.0115", "2.1333"):
        assert number in markdown([first, second, third])


def test_difference_within_two_standard_errors_is_not_shown(recipes):
    path = recipes / "b1/summary.json"
    path.write_text(path.read_text().replace('"val/loss": 1.9', '"val/loss": 2.6'))
    second = compare(results(recipes))[1]
    assert second.difference == pytest.approx((0.6 - 0.12 - 0.08) / 3)
    assert second.shown is False


def test_comparison_of_two_runs_with_one_recipe_and_seed_names_both(recipes):
    write_run(recipes / "e", seed=9)
    write_run(recipes / "f", seed=9)
    with pytest.raises(UserError, match=r"(?=.*/e\b)(?=.*/f\b)"):
        compare(results(recipes))


def test_comparison_tells_parents_and_means_of_the_same_name_apart(tmp_path):
    parents = [Parent("large", weights, 1000, 2.0, ["text"]) for weights in ("a" * 32, "b" * 32)]
    averaged = [{"name": "large", "weights": "a" * 32}]
    for name, parent, mean in (
        ("a", parents[0], []),
        ("b", parents[1], []),
        ("c", parents[0], averaged),
    ):
        summary = SUMMARY | {"init_from": dataclasses.asdict(parent), "averaged": mean}
        write_run(tmp_path / name, summary)
    _, second, third = compare(results(tmp_path))
    assert "init_from" in second.change
    assert "averaged" in third.change
    assert "init_from" not in third.change


def test_compare_writes_the_table(recipes, tmp_path, capsys):
    from minigpt.cli.analysis import compare as verb

    out = tmp_path / "table.md"
    verb([recipes / "a1", recipes / "a2", recipes / "b1", recipes / "b2"], out)
    assert "optimizer.weight_decay=0.4" in out.read_text()
    assert "-0.1100" in capsys.readouterr().out


def test_setting_that_an_earlier_version_lacks_has_its_default(tmp_path):
    for seed, more in ((1, ""), (2, ", profile: false")):
        folder = write_run(tmp_path / str(seed), seed=seed)
        with (folder / "config.yaml").open("a") as file:
            file.write(f"trainer: {{threads: null{more}}}\n")
    (comparison,) = compare(results(tmp_path), {"trainer.profile": False, "seed": 1})
    assert sorted(comparison.losses) == [1, 2]


@pytest.mark.parametrize(
    ("first", "second", "is_comparable"),
    [
        ("  valid: tuning\n", "", False),
        ("  vocab_size: 1000\n", "  vocab_size: 2000\n", False),
        ("  max_stories: 10\n", "  max_stories: 20\n", False),
        ("  max_stories: 10\n  tokenizer: a\n", "  max_stories: 20\n  tokenizer: a\n", True),
        ("  batch_size: 8\n", "  batch_size: 16\n", True),
    ],
)
def test_losses_of_other_stories_or_tokens_have_no_difference(
    tmp_path, first: str, second: str, is_comparable: bool
):
    for name, more in (("a", first), ("b", second)):
        folder = write_run(tmp_path / name)
        with (folder / "config.yaml").open("a") as file:
            file.write(more)  # in the section data, which is the last
    _, other = compare(results(tmp_path))
    assert (other.difference is not None) is is_comparable
