"""`init_from`: a run that starts with the weights and the tokenizer of another."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch

from minigpt.core.files import write_json
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.evaluation import EvaluationConfig, StoriesConfig, evaluate
from minigpt.exporting import ExportConfig, export
from minigpt.model import GPTConfig
from minigpt.runs.checkpoint import read_checkpoint, weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.provenance import Parent, parent_of
from minigpt.runs.records import read_metrics, read_summary
from minigpt.scaling.results import keep_run, read_run
from minigpt.training.config import BudgetConfig, TrainConfig
from minigpt.training.inheritance import (
    check_division,
    with_dependent_settings,
    with_vocabulary_of,
)
from tests.conftest import SHORT, trained_folder, write_stories
from tests.training.test_loop import fail_at_step

FEW = EvaluationConfig(stories=StoriesConfig(prompts=("Once",), n=1, max_tokens=5), words=("Tom",))
WIDE = ["model.context_length=32", "budget.tokens=640"]


@pytest.fixture
def other_stories(tmp_path: Path) -> list[str]:
    """Files with other text than the parent's, which would yield another tokenizer."""
    files = [
        write_stories(tmp_path / f"{name}.txt", n, seed)
        for name, n, seed in (("other", 300, 7), ("rest", 40, 8))
    ]
    return [f"data.train_files=[{files[0]}]", f"data.valid_files=[{files[1]}]"]


def weights(folder: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / name)["state_dict"]


def whole_and_broken(command: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Train a whole run, and one that is killed in step 13; return their folders."""
    whole = trained_folder([*command, "name=whole"])
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail_at_step(13))
        with pytest.raises(RuntimeError, match="interrupted"):
            trained_folder([*command, "name=broken"])
    return whole, whole.with_name("broken")


def check_same_end(run: Path, other: Path) -> None:
    """Check that two runs ended with the same weights and the same record of their parent."""
    ends = weights(run), weights(other)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert read_summary(run)["init_from"] == read_summary(other)["init_from"]


def test_init_from_starts_with_the_weights_of_the_parent(
    tiny: list[str], parent: Path, tmp_path: Path
):
    still = ["optimizer.lr=1e-12", "optimizer.matrix_lr=1e-12", "trainer.precision=32-true"]
    child = trained_folder([*tiny, *still, f"init_from={parent}", "name=child"])
    # The best checkpoint is what `Run.load` takes of the parent: after 20 steps as here, or 10.
    initial = Run.load(parent).load_model().state_dict()
    for name, weight in Run.load(child).load_model().state_dict().items():
        torch.testing.assert_close(weight, initial[name], rtol=0, atol=1e-7)
    first = read_metrics(child)[0]["train/loss"]
    assert first < read_metrics(parent)[0]["train/loss"] - 0.01


def test_init_from_keeps_the_tokenizer_and_trains_on_other_stories(
    tiny: list[str], parent: Path, other_stories: list[str]
):
    other = [text for text in tiny if "_files=" not in text] + other_stories
    child = trained_folder([*other, f"init_from={parent}", "name=child"])
    alone = trained_folder([*other, "name=alone"])
    fingerprints = [Run.load(run).tokenizer.fingerprint for run in (parent, child, alone)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert not torch.equal(
        weights(child)["net.embedding.weight"], weights(parent)["net.embedding.weight"]
    )
    evaluation = evaluate(Run.load(child), FEW)
    assert evaluation.perplexity == pytest.approx(read_summary(child)["val/perplexity"], rel=1e-4)
    record = read_summary(child)["init_from"]
    assert record["weights"] == weights_fingerprint(Run.load(parent).load_model())
    assert (record["name"], record["tokens"]) == ("parent", 1280)
    log = (child / "train.log").read_text(encoding="utf-8")
    assert re.search(r"(?=.*\bparent\b).*\b1\.28k\b", log)


def test_run_with_init_from_resumes_after_its_parent_was_deleted(
    tiny: list[str], parent: Path, monkeypatch: pytest.MonkeyPatch
):
    command = [*tiny, f"init_from={parent}", "callbacks.checkpoint_steps=5"]
    whole, broken = whole_and_broken(command, monkeypatch)
    shutil.rmtree(parent)
    assert trained_folder([*command, "name=broken", "resume=auto"]) == broken
    check_same_end(broken, whole)


def test_export_records_the_parent_and_can_be_a_parent(
    tiny: list[str], parent: Path, tmp_path: Path
):
    child = trained_folder([*tiny, f"init_from={parent}", "name=my child"])
    (child / "summary.json").unlink()  # as if it had been killed; the checkpoint has the record
    out = tmp_path / "out"
    export(Run.load(child), out, ExportConfig("safetensors"))
    seen = read_checkpoint(Run.load(child).checkpoint)["global_step"] * 64
    card = (out / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\| 1,280 .*\bparent\b.* {seen:,} \|", card)
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name

    grandchild = trained_folder([*tiny, *SHORT, f"init_from={out}", "name=grandchild"])
    summary = read_summary(grandchild)
    record = parent_of(summary, grandchild)
    assert record is not None
    assert (record.name, record.tokens, record.sources) == ("out", 1280 + seen, ["text", "text"])
    assert record.weights == weights_fingerprint(Run.load(out).load_model())


def test_init_from_a_checkpoint_file_is_stored_in_the_config(tiny: list[str], parent: Path):
    last = parent / "checkpoints/last.ckpt"
    child = trained_folder([*tiny, f"init_from={last}", "name=child"])
    assert Run.load(child).config["init_from"] == str(last)
    assert read_summary(child)["init_from"]["name"] == "parent"
    line = read_run(child).group
    assert all(name in line for name in ("train.txt", "300", "2.56k", "muon", "parent"))


def test_run_of_an_earlier_version_with_a_parent_is_resumed(
    tiny: list[str], parent: Path, monkeypatch: pytest.MonkeyPatch
):
    command = [*tiny, f"init_from={parent}", "callbacks.checkpoint_steps=5"]
    whole, broken = whole_and_broken(command, monkeypatch)
    older = {"path": "runs/parent", "commits": ["c"], "commands": [["python", "train.py"]]}
    for path in broken.glob("checkpoints/*.ckpt"):
        content = torch.load(path, weights_only=True)
        content["hyper_parameters"]["init_from"] |= older
        torch.save(content, path)
    trained_folder([f"resume={broken}"])
    check_same_end(broken, whole)


def test_model_card_names_the_data_of_run_and_parent(tiny: list[str], parent: Path, tmp_path: Path):
    summary = parent / "summary.json"
    config = parent / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("source: text", "source: tinystories_sample"), encoding="utf-8")
    child = trained_folder([*tiny, f"init_from={parent}", "name=child"])
    out = tmp_path / "out"
    export(Run.load(child), out, ExportConfig("safetensors"))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "bundled sample" in card
    assert "texts" in card
    assert "license: " not in card
    assert read_run(child).epochs == pytest.approx(1280 / read_summary(child)["train_tokens"])
    seconds = read_summary(parent)["seconds"]
    summary.unlink()
    alone = trained_folder([*tiny, *SHORT, f"init_from={parent}", "name=alone"])
    # A checkpoint records the seconds of its run.
    assert read_summary(alone)["init_from"]["seconds"] == pytest.approx(seconds, abs=5)
    export(Run.load(alone), out, ExportConfig("safetensors"))
    assert re.search(r"\| training time .*\bparent\b.*\|", (out / "README.md").read_text())


def test_invalid_parent_record_in_a_summary_is_a_one_line_error(tiny: list[str], parent: Path):
    summary = read_summary(parent)
    whole = dataclasses.asdict(Parent("x", "0" * 32, 5, 1.0, ["text"]))
    older = {"path": "runs/x", "commits": ["abc"], "commands": [["rm", "-rf", "x"]]}
    for entry in (whole, whole | older):
        write_json(parent / "summary.json", summary | {"init_from": entry})
        assert read_run(parent).tokens == 1285
    write_json(parent / "summary.json", summary | {"init_from": whole | {"name": "a\n```"}})
    with pytest.raises(UserError, match=r"(?=.*summary\.json)(?=.*init_from)") as error:
        read_run(parent)
    assert str(error.value).isprintable()  # and so one line


def test_scaling_study_counts_the_tokens_of_the_parent_and_groups_continued_runs(
    tiny: list[str], parent: Path, tmp_path: Path
):
    child = trained_folder([*tiny, f"init_from={parent}", "name=child"])
    for folder in (child, keep_run(child, tmp_path / "kept")):
        run = read_run(folder)
        assert run.tokens == 2560
        assert [tokens for tokens, _ in run.curve] == [1280 + 640, 1280 + 1280]
        assert all(name in run.group for name in ("train.txt", "300", "2.56k", "muon", "parent"))


@pytest.mark.parametrize(
    ("typed", "fix"),
    [
        (["model.d_model=32"], {"model.d_model": 16}),
        (["model.embedding_scale=1.0"], {"model.embedding_scale": None}),
    ],
)
def test_init_from_another_shape_names_the_settings(
    tiny: list[str], parent: Path, typed: list[str], fix: dict[str, object]
):
    with pytest.raises(UserError) as error:
        trained_folder([*tiny, f"init_from={parent}", "name=child", *typed])
    assert (error.value.argument, error.value.value) == ("init_from", str(parent))
    assert error.value.fix == fix
    assert not (parent.parent / "child").exists()


@pytest.mark.parametrize(
    ("typed", "named"), [("init_from=nowhere", "nowhere"), ("init_from=''", "init_from")]
)
def test_init_from_no_run_is_refused(tiny: list[str], parent: Path, typed: str, named: str):
    with pytest.raises(UserError, match=named):
        trained_folder([*tiny, f"init_from={parent}", "name=child", typed])
    assert not (parent.parent / "child").exists()


def test_init_from_allows_another_context_length_and_residual_init(tiny: list[str], parent: Path):
    child = trained_folder(
        [
            *tiny,
            *SHORT,
            f"init_from={parent}",
            "name=child",
            *WIDE,
            "model.residual_init=zero",
        ]
    )
    assert Run.load(child).load_model().config.context_length == 32


def test_resume_auto_refuses_a_new_init_from(tiny: list[str], parent: Path):
    with pytest.raises(UserError, match=r"/parent\b") as error:
        trained_folder([*tiny, "name=parent", "resume=auto", f"init_from={parent}"])
    assert (error.value.argument, error.value.fix) == ("init_from", {"init_from": None})


def mean_with(*others: Path) -> ExportConfig:
    return ExportConfig("safetensors", dtype="float32", average=tuple(map(str, others)))


def assert_is_mean(folder: Path, *runs: Path):
    weights = [Run.load(path).load_model().state_dict() for path in runs]
    for name, weight in Run.load(folder).load_model().state_dict().items():
        torch.testing.assert_close(weight, sum(w[name] for w in weights) / len(runs))


def test_export_averages_a_run_with_its_parent(tiny: list[str], parent: Path, tmp_path: Path):
    child = trained_folder([*tiny, f"init_from={parent}", "name=child"])
    out = tmp_path / "out"
    export(Run.load(child), out, mean_with(parent))
    assert_is_mean(out, parent, child)
    assert read_summary(out)["tokens"] == read_summary(child)["tokens"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| float32\b.* parent \|", card)
    command = "minigpt export runs/child out --format safetensors --dtype float32"
    assert f"{command} --average runs/parent\n" in card


@pytest.mark.long
def test_export_averages_branches_and_counts_the_tokens_of_each_once(
    tiny: list[str], parent: Path, tmp_path: Path
):
    names = ("child", "other", "third")
    branches = [
        trained_folder([*tiny, f"init_from={parent}", f"name={name}", f"seed={seed}"])
        for seed, name in enumerate(names, start=2)
    ]
    out = tmp_path / "out"
    export(Run.load(branches[0]), out, mean_with(parent, *branches[1:]))
    assert_is_mean(out, parent, *branches)
    summary, own = read_summary(out), [read_summary(branch) for branch in branches]
    assert summary["tokens"] == sum(record["tokens"] for record in own)
    assert summary["seconds"] == pytest.approx(sum(record["seconds"] for record in own))
    assert [run["name"] for run in summary["averaged"]] == ["parent", "other", "third"]
    card = (out / "README.md").read_text(encoding="utf-8")
    averaged = "--average runs/parent --average runs/other --average runs/third\n"
    assert f"minigpt export runs/child out --format safetensors --dtype float32 {averaged}" in card
    assert card.index(" name=parent") < card.index(" name=child") < card.index(" name=other")
    for name in names:
        assert re.search(rf"^minigpt train .*name={name}\b", card, re.MULTILINE)
    # An export of the mean in another format has the same record.
    export(Run.load(out), tmp_path / "hf", ExportConfig("hf"))
    assert averaged in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")


def test_average_of_unrelated_runs_is_refused(tiny: list[str], parent: Path, tmp_path: Path):
    tiny = [*tiny, *SHORT]
    child = trained_folder([*tiny, f"init_from={parent}", "name=child"])
    stranger = trained_folder([*tiny, "name=stranger", "seed=3"])
    for first, second in ((parent, child), (child, child), (child, stranger)):
        with pytest.raises(UserError) as error:
            export(Run.load(first), tmp_path / "other", mean_with(second))
        assert error.value.argument == "average"
    with pytest.raises(UserError, match="nothing"):
        export(Run.load(child), tmp_path / "other", mean_with(tmp_path / "nothing"))
    assert not (tmp_path / "other").exists()


def test_average_takes_each_run_once_and_no_mean(tiny: list[str], parent: Path, tmp_path: Path):
    tiny = [*tiny, *SHORT]
    child = trained_folder([*tiny, f"init_from={parent}", "name=child"])
    longer = [*tiny, f"init_from={parent}", "name=other", "seed=2", *WIDE]
    other = trained_folder(longer)  # the context and dropout may differ
    mean, rounded = tmp_path / "mean", tmp_path / "rounded"
    export(Run.load(child), mean, mean_with(other))
    assert_is_mean(mean, child, other)
    export(Run.load(child), rounded, ExportConfig("safetensors"))
    for first, second in (
        (child, child / "checkpoints/last.ckpt"),
        (child, rounded),  # the same weights in bfloat16
        (mean, parent),
        (other, mean),
    ):
        with pytest.raises(UserError) as error:
            export(Run.load(first), tmp_path / "new", mean_with(second))
        assert error.value.argument == "average"
    before = weights_fingerprint(Run.load(rounded).load_model())
    for first, out in ((other, rounded), (rounded, rounded), (other, rounded.parent)):
        with pytest.raises(UserError) as error:
            export(Run.load(first), out, mean_with(rounded if first == other else other))
        assert error.value.argument == "out"
    assert weights_fingerprint(Run.load(rounded).load_model()) == before


def test_folder_of_runs_is_no_parent_and_no_teacher(tiny: list[str], parent: Path):
    for name in ("init_from", "teacher.runs"):
        with pytest.raises(UserError) as error:
            trained_folder([*tiny, f"{name}={parent.parent}", "name=child"])
        assert error.value.argument == name
        assert str(parent) in str(error.value)
    assert not (parent.parent / "child").exists()


def test_typed_vocabulary_of_the_model_is_kept(parent: Path):
    tokenizer, data = Run.load(parent).tokenizer, DataConfig(vocab_size=400)
    shape = GPTConfig(400, 16, d_model=16, n_layers=1, n_heads=2, d_ff=32)
    config = TrainConfig(model=shape, data=dataclasses.replace(data, tokenizer=str(parent)))
    typed = dataclasses.replace(config, overrides=("model.vocab_size=400",))
    sizes = [
        with_vocabulary_of(
            tokenizer, dataclasses.replace(c, data=dataclasses.replace(c.data, vocab_size=3000),
            model=dataclasses.replace(shape, vocab_size=3000)),
        ).model.vocab_size
        for c in (config, typed)
    ]  # fmt: skip
    assert sizes == [tokenizer.vocab_size, 3000]


def test_download_follows_the_budget_unless_it_is_set():
    data, budget = DataConfig("hf", dataset="a/b"), BudgetConfig(5_000_000)
    config = TrainConfig(data=data, budget=budget)
    set_to_all = dataclasses.replace(data, download_tokens=None)
    typed = ("data.download_tokens=104e6",)
    tokens = [
        with_dependent_settings(dataclasses.replace(config, **values)).data.download_tokens
        for values in ({}, {"data": set_to_all}, {"overrides": typed}, {"data": DataConfig()})
    ]
    assert tokens == [5_000_000, None, 104_000_000, 104_000_000]


def test_too_few_windows_are_refused_before_the_folder_exists(tiny: list[str], tmp_path: Path):
    with pytest.raises(UserError) as error:
        trained_folder(
            [*tiny, "data.max_stories=1", "data.batch_size=64", "budget.tokens=20480", "name=few"]
        )
    assert error.value.argument == "data.batch_size"
    assert not (tmp_path / "runs/few").exists()


def test_run_on_other_stories_of_the_same_dataset_is_no_parent():
    data = DataConfig("hf", dataset="a/b", download_tokens=100)
    before = dataclasses.asdict(data)
    check_division(data, before, "init_from", "runs/a")
    for change in ({"dataset": "a/c"}, {"valid_split": "test"}, {"source": "text"}):
        check_division(data, {**before, "download_tokens": 200, **change}, "init_from", "runs/a")
    check_division(data, {**before, "download_tokens": 50}, "init_from", "runs/a")
    for change in ({"download_tokens": 200}, {"holdout": 0.01}, {"download_tokens": None}):
        with pytest.raises(UserError) as error:
            check_division(data, before | change, "init_from", "runs/a")
        assert error.value.fix["data.holdout"] == (before | change)["holdout"]


def test_split_of_a_dataset_is_not_used_twice(tiny: list[str]):
    more = ["data=hf", "data.dataset=a/b", "data.split=test", "data.valid_split=test"]
    with pytest.raises(UserError) as error:
        trained_folder([text for text in tiny if not text.startswith("data")] + more)
    assert error.value.argument == "data.valid_split"
