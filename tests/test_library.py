"""The public API of `import minigpt`."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor

import minigpt
from minigpt.core.settings import UserError
from minigpt.evaluation import EvaluationConfig, StoriesConfig
from minigpt.runs.checkpoint import read_checkpoint
from minigpt.runs.records import read_metrics, read_summary
from tests.conftest import ROOT, SHORT, composed, naming, write_stories

FEW = EvaluationConfig(stories=StoriesConfig(prompts=("Once",), n=1, max_tokens=5), words=("Tom",))


def python(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return process.stdout.strip()


def test_import_costs_no_torch_and_less_than_a_tenth_of_a_second():
    code = (
        "import sys, time; start = time.process_time(); import minigpt\n"
        "print(time.process_time() - start, 'torch' in sys.modules, 'hydra' in sys.modules)"
    )
    seconds, torch_loaded, hydra_loaded = python(code).split()
    assert float(seconds) < 0.1
    assert (torch_loaded, hydra_loaded) == ("False", "False")


def test_every_public_name_loads_and_has_a_docstring():
    assert set(dir(minigpt)) == set(minigpt.__all__)
    for name in minigpt.__all__:
        value = getattr(minigpt, name)
        assert value.__doc__, name
    assert minigpt.__version__[0].isdigit()
    assert (ROOT / "minigpt/py.typed").is_file()


def test_unknown_attribute_lists_the_public_names():
    with pytest.raises(AttributeError, match=naming("trian", "train", "load_config")) as error:
        _ = minigpt.trian
    assert str(error.value).isprintable()


def test_reading_a_function_keeps_stale_launcher_variables():
    code = (
        "import os; os.environ.update(RANK='a', SLURM_NTASKS='2'); before = dict(os.environ)\n"
        "import minigpt; minigpt.train, minigpt.evaluate; print(dict(os.environ) == before)"
    )
    assert python(code) == "True"


@pytest.mark.usefixtures("drawn_charts")
def test_training_works_in_a_thread(tiny: list[str]):
    runs: list[minigpt.Run] = []
    config = composed([*tiny, *SHORT])
    thread = threading.Thread(target=lambda: runs.append(minigpt.train(config)))
    thread.start()
    thread.join()
    assert read_summary(runs[0].folder)["status"] == "finished"


def test_several_devices_from_python_are_refused(tiny: list[str], tmp_path: Path):
    config = composed([*tiny, "trainer=ddp", "trainer.devices=2"])
    code = "from minigpt.core import distributed; print(distributed.may_start_processes())"
    assert python(code) == "False"
    with pytest.raises(UserError, match=naming("trainer.devices=2")) as error:
        minigpt.train(config)
    assert str(error.value).isprintable()
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("drawn_charts")
def test_rows_of_other_callbacks_have_the_number_of_tokens(tiny: list[str]):
    class Mine(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            for logger in trainer.loggers:
                logger.log_metrics({"mine": 1.0}, trainer.global_step)

    monitor = LearningRateMonitor(logging_interval="step")
    run = minigpt.train(composed(tiny), callbacks=[monitor, Mine()])
    assert read_summary(run.folder)["status"] == "finished"
    rows = [row for row in read_metrics(run.folder) if "mine" in row]
    assert [(row["step"], row["tokens"]) for row in rows] == [(i, 64 * i) for i in range(1, 21)]
    assert (run.folder / "report.html").is_file()


def test_checkpoint_of_a_callback_is_written_at_once(tiny: list[str], tmp_path: Path):
    class Save(Callback):
        def on_validation_start(self, trainer, pl_module) -> None:  # last.ckpt is held back
            trainer.save_checkpoint(tmp_path / "mine.ckpt")
            assert (tmp_path / "mine.ckpt").is_file()

    run = minigpt.train(composed(tiny), callbacks=[Save()])
    assert read_checkpoint(run.folder / "checkpoints/last.ckpt")["global_step"] == 20


def test_checkpoints_hold_the_state_of_callbacks_after_their_hooks(tiny: list[str]):
    states: list[tuple[int, dict[str, int]]] = []

    class Count(Callback):
        def __init__(self) -> None:
            self.counts = {"steps": 0, "validations": 0}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.counts["steps"] += 1

        def on_validation_end(self, trainer, pl_module) -> None:
            self.counts["validations"] += 1

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            path = Path(trainer.default_root_dir, "checkpoints/last.ckpt")
            if path.is_file():
                content = read_checkpoint(path)
                (state,) = [s for name, s in content["callbacks"].items() if "Count" in name]
                states.append((content["global_step"], state))

        def state_dict(self) -> dict[str, int]:
            return self.counts.copy()

    config = composed([*tiny, "callbacks.checkpoint_steps=4", "trainer.n_validations=2"])
    minigpt.train(config, callbacks=[Count()])
    assert {step for step, _ in states} == {4, 8, 10, 12, 16}
    for step, state in states:
        assert state == {"steps": step, "validations": step // 10}


def test_checkpoint_due_before_a_validation_is_written_in_it(tiny: list[str]):
    steps: list[int] = []

    class Look(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 1:
                path = Path(trainer.default_root_dir, "checkpoints/last.ckpt")
                steps.append(read_checkpoint(path)["global_step"])

    config = composed([*tiny, "callbacks.checkpoint_steps=5", "trainer.n_validations=2"])
    minigpt.train(config, callbacks=[Look()])
    assert steps == [10, 20]


@pytest.mark.parametrize("value", [np.float64(1.5), Path("x")])
def test_callback_whose_state_cannot_be_read_back_is_named(tiny: list[str], value: object):
    class Stateful(Callback):
        def state_dict(self) -> dict[str, object]:
            return {"best": value}

    with pytest.raises(UserError, match="Stateful") as error:
        minigpt.train(composed(tiny), callbacks=[Stateful()])
    assert error.value.argument == "callbacks"


class Convolution(minigpt.GPT):
    """A causal convolution over the embeddings; its kernel has three dimensions."""

    def __init__(self, config: minigpt.GPTConfig) -> None:
        super().__init__(config)
        self.kernel = torch.nn.Conv1d(config.d_model, config.d_model, 3, padding=2)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) * self.scale + self.positions[: ids.shape[1]]
        x = x + self.kernel(x.mT)[..., : ids.shape[1]].mT
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)


def test_class_with_a_convolution_trains_with_muon(tiny: list[str]):
    run = minigpt.train(composed([*tiny, "optimizer=muon"]), model=Convolution)
    kernel = run.load_model().kernel.weight
    torch.manual_seed(0)
    assert kernel.shape == (16, 16, 3)
    assert read_summary(run.folder)["val/loss"] < 6


def test_callbacks_are_called_by_lightning(tiny: list[str]):
    steps: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            steps.append(trainer.global_step)

    minigpt.train(composed(tiny), callbacks=[Count()])
    assert steps == list(range(1, 21))


def stories_of(path: Path) -> Iterator[str]:
    yield from path.read_text(encoding="utf-8").split("\n<|endoftext|>\n")


def test_stories_from_an_iterable_train_as_those_of_a_file(
    tiny: list[str], trained_once: Callable[..., Path], tmp_path: Path
):
    overrides = [
        word for word in tiny if not word.startswith(("data=", "data.train", "data.valid"))
    ]
    train, valid = stories_of(tmp_path / "train.txt"), stories_of(tmp_path / "valid.txt")
    iterable_run = minigpt.train(composed(overrides), stories=train, valid_stories=valid)
    file_run = trained_once([*tiny, "name=parent"])
    losses = [[row["train/loss"] for row in read_metrics(folder) if "lr" in row]
              for folder in (iterable_run.folder, file_run)]  # fmt: skip
    assert losses[0] == losses[1]
    evaluation = minigpt.evaluate(iterable_run, FEW)
    assert evaluation.perplexity == pytest.approx(
        read_summary(iterable_run.folder)["val/perplexity"], rel=1e-4
    )
    with pytest.raises(UserError, match=naming("stories")):
        minigpt.train(composed(overrides), stories=[])
    with pytest.raises(UserError, match=naming("stories", "int")):
        minigpt.train(composed(overrides), stories=[1, 2])
    with pytest.raises(UserError, match=naming("valid_stories")):
        minigpt.train(composed(overrides), valid_stories=["Once."])
    assert not list((tmp_path / "cache/stories").glob("*.tmp"))


def test_stories_without_a_validation_split_are_held_out(tiny: list[str], tmp_path: Path):
    overrides = [
        word for word in tiny if not word.startswith(("data=", "data.train", "data.valid"))
    ]
    path = write_stories(tmp_path / "all.txt", 300, 5)
    run = minigpt.train(composed([*overrides, "data.holdout=0.1"]), stories=stories_of(path))
    assert run.config["data"]["holdout"] == 0.1
    assert read_summary(run.folder)["status"] == "finished"


def test_a_run_reads_its_files_once(tiny: list[str], trained_once: Callable[..., Path]):
    run = minigpt.Run.load(trained_once([*tiny, "name=parent"]))
    assert (run.config is run.config, run.tokenizer is run.tokenizer) == (True, True)
    assert run.summary["steps"] == 20
    assert minigpt.Run.load(run) is run


def test_stream_story_equals_generate(tiny: list[str]):
    run = minigpt.train(composed(tiny))
    sampling = minigpt.SamplingConfig(max_tokens=8, seed=1)
    pieces = list(minigpt.stream_story(run, "Tom had", sampling))
    assert "".join(pieces) == minigpt.generate(run, "Tom had", 1, sampling)[0]
