"""The age of the models on the page: the snapshots of a run, and its loss curve."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt.model import GPT, GPTConfig
from minigpt.playground import age_page, answers, inside
from minigpt.playground.answers import Playground
from minigpt.runs.checkpoint import write_checkpoint, write_snapshot
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.conftest import ROOT
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
    curves = [playground.age_html(None, age) for age in range(N + 1)]
    marks = [re.findall(r'class="age" d="M([\d.]+)', curve) for curve in curves]
    assert all(len(mark) == 1 for mark in marks)  # the other model has no snapshots
    positions = [float(mark) for (mark,) in marks]
    assert positions == sorted(positions)
    assert positions[1] < positions[-1]
    assert "200k tokens" in curves[2]


def test_added_model_is_listed_once(playground):
    first = next(iter(playground.models.values()))
    page = Playground([])
    run = first.ages[0].run
    page.add(run)
    page.add(run)
    page.add(Run(run.folder, Path(os.path.relpath(run.checkpoint))))
    assert len(page.models) == 1
    assert page.chosen(["nobody", *page.models]) == list(page.models)


def test_stream_ends_when_the_age_changes_and_starts_again_for_the_newest():
    stream = age_page.Stream()
    assert not stream.is_due(3)  # nothing has changed yet
    story = stream.show(["a", "ab", "abc"], "nothing")
    assert next(story) == "a"
    stream.change_age(2, is_open=True)
    assert list(story) == ["nothing"]
    assert not stream.is_due(3)  # the age has changed again since
    assert stream.is_due(2)
    assert list(stream.show(["b"], "nothing")) == ["b"]
    assert not stream.is_due(2)


def test_stream_in_another_tab_is_due_only_if_it_is_shown():
    stream = age_page.Stream()
    stream.change_age(1, is_open=False)
    assert not stream.is_due(1)
    story = stream.show(["a", "ab"], "nothing")
    assert next(story) == "a"
    stream.change_age(0, is_open=False)
    stream.change_age(1, is_open=False)
    assert list(story) == ["nothing"]
    assert stream.is_due(1)  # it is not complete


def test_new_stream_ends_the_one_before():
    stream = age_page.Stream()
    first, second = stream.show(["a", "ab"], "nothing"), stream.show(["b", "bc"], "nothing")
    assert [next(first), next(second)] == ["a", "b"]
    assert list(first) == ["nothing"]
    assert list(second) == ["bc"]


# In a process of its own, because Gradio leaves event loops open.
STORY_EVENTS = """
import gradio as gr
from minigpt.playground.age_page import Stream
from minigpt.playground.answers import MAX_RUNS, Playground
from minigpt.playground.page import build_page
from minigpt.runs.folder import Run, bundled_release

playground = Playground.load([Run.load(bundled_release())])
(name,), end = playground.models, playground.n_ages
events = {fn.name: fn.fn for fn in build_page(playground).fns.values()}

titles = [events["entitle"]([name], age) for age in (1, end)]
assert playground.aged(name, 1) in titles[0][0] != titles[1][0] == f"**{name}**"
assert [len(title) for title in titles] == [MAX_RUNS] * 2

stream, seed = Stream(), 3
inputs = ["Tom had", 0.8, 0, 1.0, 0.0, 5, [name]]
def last(event, *values):
    *_, columns = events[event](*values)
    return columns[0]
written = last("write", *inputs, end, seed, stream)
events["change_age"](False, 0, stream)
assert last("follow_age", False, 0, *inputs, 0, seed, stream) == gr.skip()  # another tab is open
again = last("show_due", 0, *inputs, 0, seed, stream)
assert again not in (written, gr.skip())
assert last("show_due", 0, *inputs, 0, seed, stream) == gr.skip()
events["change_age"](True, end, stream)
assert last("follow_age", True, 0, *inputs, 0, seed, stream) == gr.skip()  # it is late
assert 'class="token' in last("follow_age", True, end, *inputs, end, seed, stream)
"""


def test_story_and_title_follow_the_age_also_if_it_was_changed_in_another_tab():
    command = [sys.executable, "-c", STORY_EVENTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
