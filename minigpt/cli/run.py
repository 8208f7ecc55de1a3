"""Run a Hydra app: train or evaluate, as a script or as a verb of `minigpt`."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import zip_longest

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from minigpt.cli.compose import composed_words, config_source, register_defaults
from minigpt.cli.hydra_errors import explain, explain_failure
from minigpt.cli.program import CLASS_PATH, Program, describe, leave
from minigpt.core.console import show_log
from minigpt.core.distributed import allow_starting_processes, global_rank
from minigpt.core.settings import UserError, speak

# Hydra's own options; everything else on the command line is a setting, without dashes.
HYDRA_FLAGS = {
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run",
    "--multirun", "--shell-completion", "--config-path", "--config-name", "--config-dir",
    "--experimental-rerun", "--info",
}  # fmt: skip


def run_app(name: str, task: Callable[[DictConfig, Program, list[str]], None]) -> None:
    """Run `task` with the settings that were typed, composed over conf/<name>.yaml.

    What the user got wrong is one line on stderr and exit code 2; ctrl-C is exit code 130.

    Args:
        name: of the root config: train or evaluate.
        task: takes the composed config, the program, and the settings as they were typed.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, where it would print and exit
    # The plugins of Slurm and Ray bring configs of the names of ours, with the same keys.
    warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore")
    # The signal before a Slurm job's time is over: that one which training answers itself.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    program = Program.detect(name)
    show_log()
    speak(program.command)
    allow_starting_processes()
    arguments = program.arguments
    classes = [word for word in arguments if word.startswith(CLASS_PATH[name])]

    def job(config: DictConfig) -> None:
        with _one_line_errors(program):
            task(config, program, classes)

    try:
        _check_dashes(arguments)
        _prepare(name, program, arguments)
        hydra.main(version_base="1.3", config_path=config_source(), config_name=name)(job)()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        leave(describe(error, program))
    except (HydraException, OmegaConfBaseException) as error:
        leave(explain(error, name))
    except (RuntimeError, ConnectionError, ValueError) as error:
        if reason := explain_failure(error):
            leave(reason)
        raise


def _prepare(name: str, program: Program, arguments: list[str]) -> None:
    """Register the defaults, and leave in sys.argv what Hydra is to read."""
    more = [f"hydra.help.app_name='minigpt {word}'" for word in program.words]
    flags = [index for index, word in enumerate(arguments) if word in ("--help", "-h")]
    if flags and (words := arguments[flags[0] + 1 :]):
        from minigpt.cli.settings_help import settings_help

        print(settings_help(name, words))
        sys.exit()
    if flags:  # answered at once: without torch, so without defaults
        from hydra.core.config_store import ConfigStore

        ConfigStore.instance().store(f"{name}_defaults", {})
        sys.argv = [program.path, "--help", *more]
        return
    register_defaults(name, arguments)
    sys.argv = [program.path, *composed_words(name, arguments), *more]


@contextlib.contextmanager
def _one_line_errors(program: Program) -> Iterator[None]:
    """Around a Hydra task: a single job that fails by the user's fault leaves at once.

    In a multirun the error goes up to Hydra, so that the other jobs still run. But Hydra would keep
    what happened to one process of several to itself, while the others wait for it.
    """
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        yield
    except (UserError, OmegaConfBaseException) as error:
        if multirun:
            raise
        if isinstance(error, UserError):
            leave(describe(error, program))
        leave(str(error).partition("\n")[0])  # what follows are OmegaConf's own types
    except Exception:
        if multirun and global_rank() > 0:
            traceback.print_exc()
            sys.exit(1)
        raise


def _check_dashes(arguments: list[str]) -> None:
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        dashed = flag.startswith("--") and flag not in HYDRA_FLAGS
        if dashed or (flag.startswith("-") and equals and not flag.startswith("--")):
            value = value if equals else following
            typed = f"{flag.lstrip('-')}={value or '<value>'}"
            raise UserError(f"settings are typed without dashes: type {typed}, not {argument}")
