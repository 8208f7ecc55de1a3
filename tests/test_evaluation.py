import io
import json
import logging
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console

from minigpt.cli.tables import show
from minigpt.core import hardware
from minigpt.core.settings import UserError, build
from minigpt.data.config import DataConfig
from minigpt.data.windows import TokenWindows
from minigpt.evaluation import (
    EvaluationConfig,
    Loss,
    StoriesConfig,
    evaluate,
    evaluate_loss,
    windows,
    write_stories,
)
from minigpt.model import GPT, GPTConfig
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests import commands
from tests.conftest import naming

STORIES = [f"The {a} saw a {b}. [{a}]" for a in ("dog", "cat") for b in ("fox", "hen", "pig")] * 5
TINY = GPTConfig(vocab_size=290, context_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=16)


def make_net() -> GPT:
    torch.manual_seed(0)
    net = GPT(TINY)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return net


def random_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 290, n, dtype=np.uint16)


@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("stride", [None, 1, 5, 8, 16])
def test_every_token_but_the_first_is_scored_once_with_the_context_it_is_promised(n, stride):
    net, tokens = make_net().eval(), random_tokens(n)
    step = stride or 16
    expected = 0.0
    with torch.no_grad():
        for target in range(1, n):
            first_window = target <= 16
            start = 0 if first_window else math.ceil((target - 16) / step) * step
            assert first_window or target - start > 16 - step
            ids = torch.from_numpy(tokens[start:target].astype(np.int64))[None]
            expected -= F.log_softmax(net(ids)[0, -1].double(), -1)[int(tokens[target])].item()
    loss = evaluate_loss(net, tokens, batch_size=3, stride=stride)
    assert loss.n_tokens == n - 1
    assert loss.nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [2, 16, 17, 18, 100])
def test_windows_side_by_side_are_those_of_training(n):
    tokens = random_tokens(n)
    training = TokenWindows(tokens, context_length=16)
    starts = training.side_by_side()
    scored = windows(tokens, range(len(starts)), 16, 16)
    assert all(map(torch.equal, scored, training.__getitems__(starts)))


def test_the_loss_does_not_depend_on_the_batch_size_and_leaves_the_net_training():
    net, tokens = make_net().train(), random_tokens(333)
    one, many = (evaluate_loss(net, tokens, batch_size) for batch_size in (1, 32))
    assert one.nats == pytest.approx(many.nats, rel=1e-6)
    assert net.training


def test_autocast_is_near_float32_and_not_the_same():
    net, tokens = make_net(), random_tokens(200)
    exact, mixed = (evaluate_loss(net, tokens, precision=p) for p in ("32-true", "bf16-mixed"))
    assert mixed.nats != exact.nats
    assert mixed.nats == pytest.approx(exact.nats, rel=0.02)


def test_perplexity_and_bits_per_byte_follow_from_the_mean():
    loss = Loss(nats=math.log(8) * 10, n_tokens=10)
    assert loss.perplexity == pytest.approx(8)
    assert loss.bits_per_byte(bytes_per_token=4.0) == pytest.approx(3 / 4)


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_that_skips_tokens_is_refused(stride):
    with pytest.raises(UserError, match=naming("stride", str(stride), "16")):
        evaluate_loss(make_net(), random_tokens(50), stride=stride)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"analogies": [["a", "b"]]}, ["analogies", "a", "b"]),
        ({"stories": {"n": 0}}, ["stories", "n", "0"]),
        ({"stories": {"temperatures": [-1]}}, ["temperature", "-1.0"]),
        ({"stride": "wide"}, ["stride", "wide"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"strid": 1}, ["strid", "stride"]),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, names):
    with pytest.raises(UserError, match=naming(*names)):
        build(EvaluationConfig, settings, "")


# ---------------------------------------------------------------------------- a whole run


def write_text_corpus(path: Path, stories: list[str]) -> str:
    path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in stories), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as train.py leaves it, of an untrained net."""
    folder = tmp_path / "runs" / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    net = make_net()
    torch.save(
        {
            "state_dict": {f"net.{name}": weight for name, weight in net.state_dict().items()},
            "hyper_parameters": {"model": asdict(TINY)},
        },
        folder / "checkpoints" / "best.ckpt",
    )
    Tokenizer.train(STORIES, 290).save(folder / "tokenizer.json")
    data = {
        "source": "text",
        "train_files": [write_text_corpus(tmp_path / "train.txt", STORIES)],
        "valid_files": [write_text_corpus(tmp_path / "valid.txt", STORIES[::7])],
        "cache_dir": str(tmp_path / "cache"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data, "model": asdict(TINY)}))
    (folder / "summary.json").write_text('{"precision": "32-true"}')
    return folder


SHORT = EvaluationConfig(
    stories=StoriesConfig(("The",), (0.5, 1.2), n=2, max_tokens=12),
    words=("dog", "[crocodile]"),
    analogies=(("dog", "cat", "hen"), ("dog", "cat", "crocodile")),
)


def test_a_run_is_all_that_evaluation_needs(run):
    found = evaluate(Run.load(run), SHORT)
    opened = Run.load(run)
    stream = [i for s in STORIES[::7] for i in (*opened.tokenizer.encode(s), 0)]
    loss = evaluate_loss(opened.load_model(), np.array(stream, dtype=np.uint16))
    assert (found.n_stories, found.n_tokens) == (5, len(stream) - 1)
    assert found.perplexity == pytest.approx(loss.perplexity)
    n_bytes = sum(len(s.encode()) for s in STORIES[::7])
    bits = loss.nats_per_token / math.log(2) * len(stream) / n_bytes
    assert found.bits_per_byte == pytest.approx(bits)
    assert [row.temperature for row in found.temperatures] == [0.5, 1.2]
    assert all(len(row.stories) == 2 for row in found.temperatures)
    assert found.novelty_stories == sum(story not in STORIES[::7] for story in STORIES)
    assert len(found.neighbours["dog"]) == 5
    assert "[crocodile]" in found.neighbours["[crocodile]"]
    assert "crocodile" in found.analogies["dog − cat + crocodile"]

    written = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(asdict(found)))
    again = evaluate(Run.load(run), SHORT)
    assert again == found  # the same seed, the same stories


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_run_of_bfloat16_is_evaluated_so_where_that_is_native(
    run, native, precision, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: native)
    (run / "summary.json").write_text('{"precision": "bf16-mixed"}')
    assert evaluate(Run.load(run), SHORT).precision == precision
    assert ("32-true" in caplog.text) is not native


def test_prompts_do_not_share_their_random_numbers(run):
    net, tokenizer = Run.load(run).load_model(), Run.load(run).tokenizer
    with torch.no_grad():
        net.embedding.weight.zero_()  # equal logits: the text depends on the random numbers alone
    config = StoriesConfig(("The dog", "The cat"), (0.5, 1.2), n=2, max_tokens=20)
    cold, hot = ([s["text"] for s in told] for told in write_stories(net, tokenizer, config, 1))
    assert len(set(cold)) == 4
    assert cold == hot


def test_another_corpus_is_read_with_the_tokenizer_of_the_run(run, tmp_path):
    other = DataConfig(
        source="text",
        valid_files=(write_text_corpus(tmp_path / "x.txt", ["A hen saw a hen."]),),
        cache_dir=str(tmp_path / "cache"),
    )
    (tmp_path / "train.txt").unlink()  # the run's own stories need not be there
    found = evaluate(Run.load(run), EvaluationConfig(data=other, stories=SHORT.stories, words=()))
    assert found.n_tokens == len(Run.load(run).tokenizer.encode("A hen saw a hen."))
    assert found.novelty_stories == 0
    assert all(row.repetition.novel is None for row in found.temperatures)


def test_what_is_shown_holds_the_numbers_and_takes_no_brackets_for_colours(run):
    found = evaluate(Run.load(run), SHORT)
    console = Console(record=True, width=140, file=io.StringIO())
    show(found, console)
    text = console.export_text()
    assert f"{found.perplexity:.3f}" in text
    assert f"{found.bits_per_byte:.4f}" in text
    assert found.temperatures[0].stories[0]["text"].split()[0] in text
    assert "[crocodile]" in text


def test_the_command_prints_the_evaluation_and_leaves_no_folders_behind(run, tmp_path):
    before = {path.name for path in tmp_path.iterdir()} | {"cache"}
    x = write_text_corpus(tmp_path / "x.txt", ["The hen saw a pig."])
    overrides = [
        "ckpt=runs/tiny", "data=text", f"data.valid_files=[{x}]", "stories.max_tokens=5",
        f"data.cache_dir={tmp_path / 'cache'}", "stride=4",
    ]  # fmt: skip
    done = commands.run("evaluate.py", overrides, tmp_path)
    assert done.code == 0, done.err
    assert "perplexity" in done.out
    written = json.loads((run / "evaluation-text-stride4.json").read_text(encoding="utf-8"))
    assert written["stride"] == 4
    assert written["data"]["valid_files"] == [x]
    assert {path.name for path in tmp_path.iterdir()} == before | {"x.txt"}


def test_a_place_that_cannot_be_written_to_is_said_before_anything_is_measured(
    run, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(Run, "load_model", lambda _: pytest.fail("measured"))
    with pytest.raises(UserError, match=naming("evaluation.json", str(file), "out")):
        evaluate(Run.load(run), EvaluationConfig(), out=file)


def test_the_command_without_a_run_says_what_to_type(tmp_path):
    done = commands.run("evaluate.py", [], tmp_path)
    assert done.code == 2
    (line,) = done.err.strip().splitlines()
    assert line.startswith("error: ")
    assert "python evaluate.py ckpt=runs/" in line
