"""Measure a trained Mini GPT: `python evaluate.py ckpt=runs/<name>`. See `--help`."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from minigpt.cli.hydra_errors import one_line_errors, run_app
from minigpt.core.settings import UserError, build

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    with one_line_errors():
        if OmegaConf.is_missing(config, "ckpt"):
            raise UserError("give the run to evaluate: python evaluate.py ckpt=runs/<name>")
        from rich.console import Console

        from minigpt.cli.tables import show
        from minigpt.core.console import console
        from minigpt.evaluation import EvaluationConfig, evaluate, evaluation_name
        from minigpt.runs.folder import REPORT, Run

        settings: Any = OmegaConf.to_container(config, resolve=True)
        run, out = Run.open(str(settings.pop("ckpt"))), settings.pop("out")
        place = run.place if out is None else Path(str(out))
        what = build(EvaluationConfig, settings, "")
        found = evaluate(run, what, console, place)
        terminal = Console()
        show(found, terminal)
        for kind, path in {
            "numbers": place / evaluation_name(what),
            "report": run.folder / REPORT,
        }.items():
            if path.is_file():
                terminal.print(f"{kind + ':':9}{path}", markup=False, highlight=False)


if __name__ == "__main__":
    run_app(main, CONF, "evaluate")
