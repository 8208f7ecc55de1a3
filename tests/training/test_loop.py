"""train → resume → evaluate, on a tiny net and corpus."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minigpt.core.hardware import Hardware
from minigpt.core.settings import UserError
from minigpt.data import sources
from minigpt.data.corpus import Corpus
from minigpt.evaluation import EvaluationConfig, StoriesConfig, evaluate
from minigpt.runs.checkpoint import read_checkpoint
from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics, read_samples, read_summary
from minigpt.training import assembly
from minigpt.training.loop import _kernels
from tests.conftest import ROOT, SHORT, composed, naming, trained_folder, write_stories

FEW = EvaluationConfig(stories=StoriesConfig(prompts=("Once",), n=1, max_tokens=5), words=("Tom",))


@pytest.mark.usefixtures("drawn_charts")
def test_run_folder_holds_config_metrics_samples_summary_and_report(
    tiny: list[str], tmp_path: Path
):
    folder = trained_folder(tiny)
    assert folder.parent == tmp_path / "runs"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "tokenizer.json", "metrics.csv", "samples.jsonl", "summary.json",
        "report.html", "train.log", "checkpoints", ".lock",
    }  # fmt: skip
    rows = read_metrics(folder)
    training = [row for row in rows if "train/loss" in row]
    validation = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in training] == list(range(1, 21))
    assert [row["step"] for row in validation] == [10, 20]
    assert all(row["tokens"] == 64 * row["step"] for row in rows)
    assert {"lr", "grad_norm", "tokens_per_second", "mfu"} <= training[-1].keys()
    last = validation[-1]
    assert last["val/perplexity"] == pytest.approx(math.exp(last["val/loss"]), rel=1e-5)
    assert abs(training[0]["train/loss"] - math.log(300)) < 0.1
    assert [sample["step"] for sample in read_samples(folder)] == [10, 20]
    summary = read_summary(folder)
    assert (summary["status"], summary["steps"], summary["model"]) == ("finished", 20, "small")
    net = Run.load(folder).load_model()
    assert summary["flops_per_token"] == net.flops_per_token()
    assert (
        summary["train_tokens"]
        == read_checkpoint(folder / "checkpoints/last.ckpt")["hyper_parameters"]["train_tokens"]
    )
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")


def test_compile_without_a_compiler_is_an_error_before_the_run(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("minigpt.training.loop.has_cpp_compiler", lambda: False)
    with pytest.raises(UserError, match=naming("trainer.compile", "g++")):
        trained_folder([*tiny, "trainer.compile=true"])
    assert not Path(composed(tiny).runs_dir).exists()


def test_evaluation_agrees_with_what_training_logged(parent: Path):
    logged = read_summary(parent)
    evaluation = evaluate(Run.load(parent), FEW)
    assert evaluation.perplexity == pytest.approx(logged["val/perplexity"], rel=1e-4)
    assert evaluation.bits_per_byte == pytest.approx(logged["val/bits_per_byte"], rel=1e-4)
    written = json.loads((parent / "evaluation.json").read_text(encoding="utf-8"))
    assert written["perplexity"] == evaluation.perplexity


def test_seed_determines_the_weights(tiny: list[str]):
    weights = [
        read_checkpoint(trained_folder([*tiny, *SHORT, f"seed={seed}"]) / "checkpoints/last.ckpt")
        for seed in (1, 1, 2)
    ]
    first, again, other = (content["state_dict"] for content in weights)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["net.embedding.weight"], other["net.embedding.weight"])


RECIPE = [
    "data.noise=0.2",
    "optimizer.final_weight_decay=0.3",
    "optimizer.normalize_rows=after",
]


@pytest.mark.parametrize(
    ("accumulate", "n_validations", "validated", "recipe"),
    # 80 batches are no whole number of steps by 6
    [(1, 2, [10, 20], []), (4, 6, [4, 8, 12, 16, 20], RECIPE)],
)
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_run(
    accumulate: int,
    n_validations: int,
    validated: list[int],
    recipe: list[str],
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    tiny = [
        *tiny,
        f"trainer.accumulate_grad_batches={accumulate}",
        f"budget.tokens={1280 * accumulate}",
        f"trainer.n_validations={n_validations}",
        *recipe,
    ]
    whole = trained_folder([*tiny, "name=whole"])
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail_at_step(13))
        with pytest.raises(RuntimeError, match="interrupted"):
            trained_folder([*tiny, "name=broken"])
    broken = whole.parent / "broken"
    assert read_summary(broken)["status"] == "failed"
    assert trained_folder([f"resume={broken}"]) == broken
    assert read_summary(broken)["status"] == "finished"
    assert [sample["step"] for sample in read_samples(broken)] == validated
    assert trained_folder([f"resume={broken}"]) == broken  # nothing is left to do
    assert len(read_metrics(broken)) == len(read_metrics(whole))
    ends = [read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"] for run in (whole, broken)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    group = read_checkpoint(broken / "checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"]
    assert group[0]["weight_decay"] == pytest.approx(0.3 if recipe else 0.1)
    steps = [[row["step"] for row in read_metrics(run)] for run in (whole, broken)]
    assert steps[0] == steps[1]


def test_kernels_for_another_device_are_refused_by_the_name_of_the_setting():
    with pytest.raises(UserError) as error:
        _kernels(Hardware("cuda", 1, 1, "32-true", "as requested"), "cpu")
    assert (error.value.argument, error.value.fix) == (
        "trainer.kernels", {"trainer.kernels": "auto"},
    )  # fmt: skip


def fail_at_step(step: int):
    def on_train_batch_start(self, batch, batch_idx) -> None:
        if self.global_step == step:
            raise RuntimeError("interrupted")

    return on_train_batch_start


@pytest.mark.long
def test_ctrl_c_writes_a_checkpoint_and_the_report(tiny: list[str], tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "train.py", *tiny, "budget.tokens=64e6", "name=stopped"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "runs/stopped"
    while len(read_metrics(folder)) < 20 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(2)  # SIGINT
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    summary = read_summary(folder)
    assert summary["status"] == "interrupted"
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == summary["steps"] > 0
    assert "interrupted" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("drawn_charts")
def test_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    def poison(self, batch, batch_idx) -> None:
        if self.global_step == 15:
            torch.nn.init.constant_(self.net.final_norm.weight, math.nan)

    monkeypatch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", poison)
    with pytest.raises(UserError, match=r"(?=.*\bnan\b)(?=.*\b15\b)(?=.*optimizer\.lr=)"):
        trained_folder([*tiny, "name=diverged"])
    folder = Path(composed(tiny).runs_dir) / "diverged"
    assert read_summary(folder)["status"] == "failed"
    checkpoint = read_checkpoint(folder / "checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 10
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())


def test_two_runs_of_the_same_second_have_separate_folders(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-120000")
    folders: list[Path] = []
    for _ in range(2):
        folders.append(trained_folder([*tiny, *SHORT]))
    assert [f.name for f in folders] == ["small-20260101-120000", "small-20260101-120000-2"]


def test_resume_of_a_folder_without_a_checkpoint_is_refused(tiny: list[str], tmp_path: Path):
    (tmp_path / "runs/empty").mkdir(parents=True)
    with pytest.raises(UserError, match="(?=.*runs/empty)(?=.*resume=.auto)"):
        trained_folder([*tiny, "name=empty"])
    trained_folder([*tiny, *SHORT, "name=empty", "resume=auto"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_logger_that_is_not_installed_is_refused_before_the_run_folder_exists(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr("minigpt.training.loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"(?=.*logger=.*{name})(?=.*pip install {name})"):
        trained_folder([*tiny, f"logger={name}"])
    assert not (tmp_path / "runs").exists()


def test_name_of_an_existing_run_is_refused(tiny: list[str], tmp_path: Path):
    (tmp_path / "runs/mine/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/mine/checkpoints/last.ckpt").write_text("")
    with pytest.raises(UserError, match="resume=.*runs/mine"):
        trained_folder([*tiny, "name=mine"])


def test_gradient_accumulation_equals_a_larger_batch(tiny: list[str]):
    common = [*tiny, "trainer.precision=32-true", "optimizer.lr=1e-3"]
    large = trained_folder([*common, "data.batch_size=8"])
    small = trained_folder([*common, "trainer.accumulate_grad_batches=2"])
    ends = [read_checkpoint(run / "checkpoints/last.ckpt") for run in (large, small)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 10
    for name, weight in ends[0]["state_dict"].items():
        torch.testing.assert_close(weight, ends[1]["state_dict"][name], rtol=1e-3, atol=1e-5)


def test_upload_of_the_model_needs_a_callback(tiny: list[str]):
    with pytest.raises(UserError, match=naming("logger.log_model", "WandbModel")):
        trained_folder([*tiny, "logger=wandb", "logger.log_model=true"])


def test_tensorboard_files_hold_curves_stories_and_final_metrics(tiny: list[str]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder = trained_folder([*tiny, "logger=tensorboard", "optimizer.lr=0.002"])
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    summary, samples = read_summary(folder), read_samples(folder)
    assert [event.step for event in events.Scalars("val/perplexity")] == [10, 20]
    for name in ("perplexity", "bits_per_byte"):
        (final,) = events.Scalars(f"final/{name}")
        assert final.value == pytest.approx(summary[f"val/{name}"], rel=1e-5)
    stories = events.Tensors("samples/0/text_summary")
    for event, sample in zip(stories, samples, strict=True):
        assert event.step == sample["step"]
        (text,) = event.tensor_proto.string_val
        assert text.decode() == f"**{sample['prompt']}**{sample['text']}"
    metadata = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(metadata).session_start_info.hparams
    assert values["optimizer/lr"].number_value == 0.002


def test_validation_runs_after_the_last_step_for_any_number_of_steps(tiny: list[str]):
    folder = trained_folder([*tiny, "budget.tokens=1408", "trainer.n_validations=3"])  # 22 steps
    steps = [row["step"] for row in read_metrics(folder) if "val/loss" in row]
    assert steps == [8, 16, 22]


def test_last_step_is_validated_and_saved_when_only_a_checkpoint_is_due(tiny: list[str]):
    uneven = ["budget.tokens=1408", "trainer.n_validations=3", "callbacks.checkpoint_steps=11"]
    folder = trained_folder([*tiny, *uneven])  # 22 steps, validated after 8, 16 and 22
    last = read_checkpoint(folder / "checkpoints/last.ckpt")
    best = read_checkpoint(folder / "checkpoints/best.ckpt")
    assert last["global_step"] == read_summary(folder)["steps"] == 22
    assert best["global_step"] == 22  # the lowest loss is that of the end


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["+foo=1"], ["foo"]),
        (["model.d_model=100", "model.n_heads=8"], ["d_model", "100", "n_heads"]),
        (["budget=3"], ["budget=3", "budget."]),
        (["budget.tokens=100"], ["2,048", "budget.tokens=2048"]),
        (["budget.tokens=1e6"], ["500", "488", "optimizer.warmup_steps=48"]),
        (["trainer.max_steps=100"], ["trainer.max_steps=100", "budget.tokens=204800"]),
        (["trainer.max_epochs=3"], ["trainer.max_epochs=3", "budget.tokens"]),
        (["resume=runs/absent"], ["runs/absent"]),
        (["name=../x"], ["name", "../x", "runs_dir"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_incompatible_settings_are_refused_before_anything_is_written(
    overrides: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        trained_folder(overrides)
    assert all(name in str(error.value) for name in names)
    assert list(tmp_path.iterdir()) == []


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> Path:
    """The run folder of a run that gets a ctrl-C while it is in the middle of `step`."""
    pressed: list[bool] = []

    def on_train_batch_start(self, batch, batch_idx) -> None:
        if self.global_step == step and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(
            "minigpt.training.module.GPTModule.on_train_batch_start", on_train_batch_start
        )
        with pytest.raises(KeyboardInterrupt):
            trained_folder([*overrides, "name=stopped"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
    return Path(composed(overrides).runs_dir) / "stopped"


@pytest.mark.long
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [6, 9])  # 9: the step after which validation comes
def test_run_resumed_after_ctrl_c_equals_an_uninterrupted_one(
    accumulate: int, step: int, tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    tiny = [
        *tiny,
        f"trainer.accumulate_grad_batches={accumulate}",
        f"budget.tokens={1280 * accumulate}",
    ]
    whole = trained_folder([*tiny, "name=whole"])
    stopped = stopped_at(step, monkeypatch, tiny)
    assert read_summary(stopped)["status"] == "interrupted"
    commit = read_summary(stopped)["commit"]
    with monkeypatch.context() as patched:
        patched.setattr(assembly, "source_commit", lambda: "a1b2")
        trained_folder([f"resume={stopped}"])
    assert read_summary(stopped)["commit"] == f"{commit}, a1b2"
    ends = [
        read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"] for run in (whole, stopped)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    rows = [
        [(row["step"], row.get("val/loss")) for row in read_metrics(run)]
        for run in (whole, stopped)
    ]
    assert rows[0] == rows[1]


def test_resume_is_refused_when_the_stories_changed(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped = stopped_at(5, monkeypatch, tiny)
    write_stories(tmp_path / "train.txt", 300, 9)
    with pytest.raises(UserError, match="train_tokens"):
        trained_folder([f"resume={stopped}"])


def test_a_run_on_another_edition_of_the_sample_is_not_resumed(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = (tmp_path / "train.txt", tmp_path / "second.txt")
    write_stories(second, 900, 9)
    valid = (tmp_path / "valid.txt",)
    monkeypatch.setattr(sources, "bundled_sample", lambda: Corpus((first,), valid))
    sample = [word for word in tiny if not re.match(r"data=|data\.\w+_files=", word)]
    stopped = stopped_at(5, monkeypatch, sample)
    assert Run.load(stopped).config["data"]["source"] == "tinystories_sample"
    monkeypatch.setattr(sources, "bundled_sample", lambda: Corpus((second,), valid))
    with pytest.raises(UserError, match=naming("train_tokens")) as error:
        trained_folder([f"resume={stopped}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("callbacks", ["default", "quiet"])
def test_checkpoint_is_never_written_with_nan_weights(
    callbacks: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    def poison(self) -> None:
        torch.nn.init.constant_(self.net.final_norm.weight, math.nan)

    monkeypatch.setattr("minigpt.training.module.GPTModule.on_validation_epoch_start", poison)
    overrides = [text for text in tiny if not text.startswith("callbacks.")]
    with pytest.raises(UserError, match=r"(?=.*\bnan\b)(?=.*\b10\b)"):
        trained_folder([*overrides, f"callbacks={callbacks}", "name=nan"])
    assert not list(Path(composed(tiny).runs_dir).glob("nan/checkpoints/*"))


def test_run_is_evaluated_from_another_working_directory(
    tiny: list[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    relative = [text.replace(f"{tmp_path}/", "") for text in [*tiny, *SHORT]]
    folder = trained_folder(relative).absolute()
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert evaluate(Run.load(folder), FEW).perplexity > 1


@pytest.mark.long
def test_run_moved_to_another_machine_is_evaluated_and_resumed_there(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail_at_step(13))
        with pytest.raises(RuntimeError, match="interrupted"):
            trained_folder([*tiny, "name=broken"])
    (tmp_path / "cache").rename(tmp_path / "cache-of-the-other-machine")
    monkeypatch.chdir(tmp_path)
    assert evaluate(Run.load("runs/broken"), FEW).perplexity > 1
    assert (tmp_path / ".cache/prepared").is_dir()
    folder = trained_folder(["resume=runs/broken", "data.cache_dir=another"])
    assert read_summary(folder)["status"] == "finished"
    assert (tmp_path / "another/prepared").is_dir()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("windows", "names"),
    [
        (4, ("data.batch_size=2", "trainer.accumulate_grad_batches=2")),
        (3, ("data.batch_size", "trainer.accumulate_grad_batches")),
    ],
)
def test_out_of_memory_names_batch_size_and_accumulation(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, windows: int, names: tuple[str, ...]
):
    def allocate(self, batch, batch_idx) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        finally:
            if windows == 3:  # as at the end of the recording of a CUDA graph
                raise RuntimeError("CUDA error: operation failed due to a previous error")

    monkeypatch.setattr("minigpt.training.module.GPTModule.training_step", allocate)
    with pytest.raises(UserError, match=naming(*names)) as error:
        trained_folder([*tiny, f"data.batch_size={windows}", "name=large"])
    assert "\n" not in str(error.value)
    assert read_summary(Path(composed(tiny).runs_dir) / "large")["status"] == "failed"


def test_metrics_are_synced_to_disk_with_checkpoints_alone(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    syncs = []
    monkeypatch.setattr("minigpt.training.loggers.MetricsCsv.sync", lambda self: syncs.append(1))
    trained_folder([*tiny, "trainer.n_validations=1"])
    assert len(syncs) == 3  # before the validation, best.ckpt and last.ckpt, after 20 rows
