"""The age of the models on the page: the snapshots of a run, and its loss curve."""

import math
import os
import re
from pathlib import Path

import pytest
import torch

from minigpt.model import GPT, GPTConfig
from minigpt.playground import answers, inside
from minigpt.playground.age_page import curves_of
from minigpt.playground.answers import Playground
from minigpt.runs.checkpoint import write_checkpoint, write_snapshot
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.playground.test_answers import USUAL, model, plain
from tests.run_folder import write_run

N = 4


@pytest.fixture(scope="module")
def playground(tmp_path_factory) -> Playground:
    """A run with snapshots of growing weights, and one without."""
    folder = write_run(tmp_path_factory.mktemp("ages") / "grown")
    words = "the dog ran and the cat sat with mom and dad and the girl and the boy"
    tokenizer = Tokenizer.train([words] * 5, 330)
    tokenizer.save(folder / "tokenizer.json")
    shape = {"vocab_size": tokenizer.vocab_size, "context_length": 64, "d_model": 16,
             "n_layers": 2, "n_heads": 2, "d_ff": 16}  # fmt: skip
    (folder / "config.yaml").write_text(f"model: {shape}\n")
    (folder / "snapshots").mkdir()
    (folder / "checkpoints").mkdir()
    for step in range(N):
        torch.manual_seed(step)
        net = GPT(GPTConfig(**shape))
        values = {"step": step, "tokens": 100_000 * step, "train_loss": math.nan}
        path = folder / f"snapshots/step-{step:06d}.safetensors"
        write_snapshot(path, net, {"model": shape}, values)
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": {"model": shape}, "global_step": 40}
    write_checkpoint(folder / "checkpoints/best.ckpt", content)
    loaded = Playground.load([Run.load(folder)])
    return Playground([*loaded.models.values(), model("young", tokenizer)])


def test_each_position_of_the_slider_is_a_snapshot_and_the_last_the_run(playground):
    name, young = playground.models
    assert playground.n_ages == N
    names = [playground.aged(name, age) for age in range(N + 1)]
    assert len(set(names)) == N + 1
    assert names[-1] == playground.aged(name, None) == name
    assert {playground.aged(young, age) for age in range(N)} == {young}
    weights = [playground.models[key].net.embedding.weight for key in names]
    assert not any(torch.equal(weights[i], weights[i + 1]) for i in range(N - 1))
    assert list(playground.models) == [name, young]  # loaded ages are not listed


def test_model_with_fewer_snapshots_shares_the_slider(playground):
    (grown, *_) = playground.models.values()
    short = answers.replace(grown, name="short", ages=grown.ages[::2])
    both = Playground([grown, short])
    assert [both.aged("short", age) for age in range(N)] == [
        short.ages[i].name for i in (0, 0, 1, 1)
    ]


def test_slider_keeps_its_length_when_models_are_added(playground):
    (grown, young) = playground.models.values()
    page = Playground([young], min_ages=N + 2)
    assert (page.n_ages, page.has_ages) == (N + 2, False)
    page.add(grown.ages[0].run)
    assert (page.n_ages, page.has_ages) == (N + 2, True)
    (name,) = [name for name in page.models if name != "young"]
    assert page.aged(name, N + 2) == name
    assert {page.aged(name, age) for age in range(N + 2)} == {
        model_age.name for model_age in page.models[name].ages
    }


def test_answers_follow_the_age_with_the_same_seed(playground):
    name, _ = playground.models

    def story(age: int | None) -> str:
        *_, (text,) = playground.write("the dog", **USUAL, names=[name], age=age, seed=3)
        return plain(text.partition('<div class="note"')[0])

    assert story(0) == story(0) != story(1)
    young, old = playground.aged(name, 0), name
    assert playground.neighbours(young, "dog") != playground.neighbours(old, "dog")
    assert playground.attention(young, "the dog", 1, 1) != playground.attention(
        old, "the dog", 1, 1
    )
    maps = [playground.map(key) for key in (young, young, old)]
    assert all('class="map"' in each for each in maps)
    assert maps[0] == maps[1] != maps[2]
    for answer in (inside.lens, inside.activity):
        assert answer(playground, young, "the dog") != answer(playground, old, "the dog")
    scores = [playground.models[key].scores for key in (young, old)]
    assert all(score is not None for score in scores)
    assert not torch.equal(scores[0].induction, scores[1].induction)
    with pytest.raises(KeyError):
        playground.models["nobody"]


def test_loss_curve_has_a_marker_at_the_age(playground):
    _name, _ = playground.models
    curves = [playground.age_html([], age) for age in range(N + 1)]
    marks = [re.findall(r'class="age" d="M([\d.]+)', curve) for curve in curves]
    assert all(len(mark) == 1 for mark in marks)  # the other model has no snapshots
    positions = [float(mark) for (mark,) in marks]
    assert positions == sorted(positions)
    assert positions[1] < positions[-1]
    assert "200k tokens" in curves[2]


def test_chosen_models_have_loss_curves_however_many_models_there_are(playground):
    (grown, _) = playground.models.values()
    many = Playground([answers.replace(grown, name=f"model-{i}") for i in range(9)])

    def shown(chosen: list[object]) -> list[str]:
        page = curves_of(many, N, chosen)
        return re.findall(r"<figcaption>(model-\d)</figcaption>", page)

    assert shown([None, []]) == [f"model-{i}" for i in range(4)]
    assert shown([["model-7", "model-8"], "model-6", "nobody"]) == [
        "model-7", "model-8", "model-6", "model-0",
    ]  # fmt: skip
    assert len(shown([["model-1", "model-2", "model-3", "model-4"], "model-5", "model-1"])) == 5


def test_added_model_is_listed_once(playground):
    first = next(iter(playground.models.values()))
    page = Playground([])
    run = first.ages[0].run
    page.add(run)
    page.add(run)
    page.add(Run(run.folder, Path(os.path.relpath(run.checkpoint))))
    assert len(page.models) == 1
    assert page.chosen(["nobody", *page.models]) == list(page.models)
