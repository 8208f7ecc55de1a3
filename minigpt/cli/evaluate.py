"""`minigpt evaluate` and the evaluate.py of a checkout: measure a trained model."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from minigpt.cli.compose import evaluation_config, plain_values, typed_class
from minigpt.cli.program import Program
from minigpt.cli.run import run_app
from minigpt.core.settings import UserError


def main() -> None:
    """Run `minigpt evaluate` or evaluate.py."""
    run_app("evaluate", _evaluate)


def _evaluate(config: DictConfig, program: Program, classes: list[str]) -> None:
    if config.hf is not None:
        _evaluate_hf(config)
        return
    if OmegaConf.is_missing(config, "ckpt"):
        example = ("evaluate", {"ckpt": "runs/my-run"})
        raise UserError("give the run to evaluate", "ckpt", command=example)
    from rich.console import Console

    from minigpt.cli.tables import show
    from minigpt.core.console import console  # for progress; results go to stdout
    from minigpt.core.files import user_path
    from minigpt.evaluation.evaluator import evaluate
    from minigpt.evaluation.results import evaluation_name
    from minigpt.runs.folder import Run
    from minigpt.runs.names import REPORT

    values = plain_values(config)
    run = Run.load(str(values["ckpt"]), typed_class("class_path", classes))
    folder = run.output_dir if values["out"] is None else user_path(str(values["out"]), "out")
    settings = evaluation_config(values)
    evaluation = evaluate(run, settings, console, folder)
    terminal = Console()
    show(evaluation, terminal)
    numbers = folder / evaluation_name(settings, evaluation)
    for kind, path in (("numbers:", numbers), ("report:", run.folder / REPORT)):
        if path.is_file():
            terminal.print(f"{kind:9}{path}", markup=False, highlight=False, soft_wrap=True)


def _evaluate_hf(config: DictConfig) -> None:
    if not OmegaConf.is_missing(config, "ckpt"):
        raise UserError("cannot be combined with ckpt: give only one of them", "hf", config.hf)
    from rich.console import Console

    from minigpt.cli.tables import show_hf
    from minigpt.core.console import console
    from minigpt.core.files import user_path
    from minigpt.evaluation.hugging_face import evaluate_hf, evaluation_hf_name

    values = plain_values(OmegaConf.merge(config, {"ckpt": None}))
    folder = user_path(str(values["hf"]), "hf")
    out = user_path(str(values["out"] or ""), "out")
    terminal = Console()
    settings = evaluation_config(values)
    show_hf(evaluate_hf(folder, settings, console, out), terminal)
    numbers = out / evaluation_hf_name(folder, settings)
    terminal.print(f"numbers: {numbers}", markup=False, highlight=False, soft_wrap=True)
