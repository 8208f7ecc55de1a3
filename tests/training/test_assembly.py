"""What is decided before the first step: settings, log, losses and kernels."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minigpt.core.hardware import Hardware
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.kernels.choice import kernels_for
from minigpt.model import GPT, GPTConfig
from minigpt.training import assembly
from minigpt.training.assembly import config_text
from minigpt.training.config import CallbacksConfig, OptimizerConfig, TrainConfig, TrainerConfig
from tests.conftest import naming, trained_folder


def test_float16_on_cpu_falls_back_and_the_log_names_the_precision(tiny: list[str]):
    folder = trained_folder([*tiny, "trainer.precision=16-mixed"])
    log = (folder / "train.log").read_text(encoding="utf-8")
    fallback = Hardware.single("auto").precision
    assert re.search(rf"\b{fallback}\b.*\b16-mixed\b", log)


def test_compile_replaces_the_loss_that_training_calls(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def compile(function):  # replaces torch.compile, which takes half a minute
        def compiled(*arguments):
            calls.append(len(arguments))
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    trained_folder([*tiny, "trainer.compile=true", "trainer.n_validations=1"])
    assert len(calls) >= 20


def test_loss_of_training_by_device_precision_and_settings(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss: ("compiled", loss))

    class Mine(GPT):
        def forward(self, ids: torch.Tensor, cache: object = None) -> torch.Tensor:
            return super().forward(ids)

    def loss_on(
        device: str, dropout: float = 0.0, precision: str = "bf16-mixed",
        teacher: type[GPT] | None = None, **settings: Any,
    ) -> object:  # fmt: skip
        shape = GPTConfig(61, 16, d_model=16, n_layers=1, n_heads=1, dropout=dropout)
        teachers = [] if teacher is None else [teacher(shape)]
        module = SimpleNamespace(
            net=GPT(shape), fast_loss=None, distillation=None, teachers=teachers
        )
        adamw, quiet = OptimizerConfig("adamw"), CallbacksConfig(prompts=())  # for fsdp
        trainer = TrainerConfig(**settings)
        config = TrainConfig(model=shape, optimizer=adamw, trainer=trainer, callbacks=quiet)
        hardware = SimpleNamespace(accelerator=device, precision=precision)
        kernels = kernels_for(device, config.trainer.kernels)
        assembly.set_losses(module, kernels, hardware, config, None)  # type: ignore[arg-type]
        graphs = device == "cuda" and config.trainer.cuda_graph
        assert module.graphed_updates == graphs
        return module.fast_loss

    micro_batches = loss_on("cpu")
    assert callable(micro_batches)
    assert micro_batches.__qualname__.startswith("microbatched_loss")
    assert loss_on("cpu", strategy="fsdp") is None  # the net's own
    assert loss_on("cpu", kernels="torch") is None
    for compiled in (
        loss_on("cpu", compile=True),
        loss_on("cuda", compile=True, precision="16-mixed"),
        loss_on("cuda", compile=True, cuda_graph=False),
    ):
        assert isinstance(compiled, tuple)
        assert compiled[0] == "compiled"
        assert compiled[1].__qualname__ == "GPT.loss"
    for graphed in (loss_on("cuda"), loss_on("cuda", compile=True)):
        assert callable(graphed)
        assert graphed.__qualname__.startswith("graphed_loss")
    assert loss_on("cuda", dropout=0.1) is None
    assert loss_on("cuda", precision="16-mixed") is None
    assert callable(loss_on("cuda", teacher=GPT))
    assert loss_on("cuda", teacher=Mine) is None  # a graph would not run its code again
    assert loss_on("mps") is None


def test_config_too_long_to_be_read_again_is_refused():
    files = tuple(f"{'x' * 60}{n}.txt" for n in range(1000))
    config = TrainConfig(data=DataConfig(source="text", train_files=files))
    with pytest.raises(UserError, match=naming("config.yaml", "data.train_files")):
        config_text(config, "run")
