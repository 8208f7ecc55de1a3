"""Run a Hydra app, train or evaluate, as a script or as a verb (subcommand) of `minigpt`."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from minigpt.cli.compose import composed_words, config_source, first_setting, register_defaults
from minigpt.cli.exits import exit_code, is_interrupt, orderly_exit
from minigpt.cli.hydra_errors import explain, explain_failure
from minigpt.cli.program import Program, describe, leave, names_class, use_utf8
from minigpt.cli.words import without_dashes
from minigpt.core.console import log
from minigpt.core.cores import limit_threads
from minigpt.core.distributed import (
    Launcher,
    allow_starting_processes,
    forget_launcher,
    forget_stale_launcher,
    global_rank,
)
from minigpt.core.files import provide_home
from minigpt.core.settings import UserError, one_line, speak
from minigpt.core.signals import watch
from minigpt.core.typed import typed_settings

_sweep: dict[str, str] = {}  # folder and launcher of the multirun of this process


class RecordSweep(Callback):
    """Hydra callback that records the folder and the launcher of a multirun.

    `run_app` uses them to log how to continue a multirun that was interrupted.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Record the folder and the launcher of the multirun."""
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        _sweep.update(dir=config.hydra.sweep.dir, launcher=launcher)


def run_app(name: str, task: Callable[[DictConfig, Program, list[str]], None]) -> None:
    """Compose conf/<name>.yaml with the settings of the command line, and run `task`.

    At a `UserError`, the program prints one line on stderr and exits with the code of the error,
    which is usually 2. `orderly_exit` handles signals.

    Args:
        name: name of the root config, train or evaluate.
        task: function to call with three arguments: the composed config, the `Program` that this
            process runs, and a list of the typed settings that name a model class. These settings
            are not passed to Hydra.
    """
    use_utf8()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of exiting
    # The plugins for Slurm and Ray register configs with the same names and keys as conf/.
    warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore")
    # Make Slurm send SIGUSR1 before a job times out, because training handles this signal.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    program = Program.detect(name)
    if name != "train":  # a single process, even if torchrun or srun started it
        forget_launcher()
        limit_threads()
    speak(program.command)
    arguments: list[str] = []
    classes: list[str] = []
    _sweep.clear()

    def job(config: DictConfig) -> None:
        speak(program.command)  # again, because a launcher may have started another process
        allow_starting_processes()
        with _one_line_errors(name, program):
            task(config, program, classes)

    with orderly_exit(name):
        try:
            arguments += without_dashes(program.arguments)
            classes += [word for word in arguments if names_class(word, name)]
            _prepare(name, program, arguments)
            hydra.main(version_base="1.3", config_path=config_source(), config_name=name)(job)()
        except (KeyboardInterrupt, SystemExit):
            if _sweep and watch.number and global_rank() == 0:
                if _sweep["launcher"] == "submitit_slurm":
                    log.info(
                        "jobs:      those in Slurm continue; squeue lists them, scancel ends them"
                    )
                log.info("sweep:     %s", _sweep_again(program, arguments, _sweep["dir"]))
            raise
        except UserError as error:
            leave(describe(error, program), error.exit_code)
        except Exception as error:
            _leave_explained(error, name, program)
            raise


def _leave_explained(error: Exception, name: str, program: Program) -> None:
    """Exit with one line that explains an error of a library; return if no explanation is known.

    The function also returns if the error follows from a Ctrl-C, because `orderly_exit` handles
    this case. After a signal, a process with a rank above 0 exits without a line.

    Args:
        error: the error.
        name: name of the root config.
        program: the program that runs.
    """
    if is_interrupt(error):
        return
    if watch.number and global_rank():  # the first process has ended, and stops this one
        sys.exit(128 + watch.number)
    if isinstance(error, HydraException | OmegaConfBaseException):
        leave(describe(explain(error, name), program))
    if reason := explain_failure(error, name):
        leave(one_line(reason), exit_code(error))


def _sweep_again(program: Program, arguments: list[str], sweep_dir: str) -> str:
    """Return the command that continues a multirun without training its finished jobs again."""
    key = "hydra.sweep.dir"  # as typed, it may contain an interpolation, such as the time
    words = [word for word in arguments if not word.startswith(f"{key}=")]
    i = first_setting(words)
    words[i:i] = typed_settings({key: sweep_dir})
    return program.command("train", *words)


def _prepare(name: str, program: Program, arguments: list[str]) -> None:
    """Register the default settings with Hydra, and rewrite sys.argv for Hydra.

    For `--help NAME`, the help of the setting or group NAME is printed and the program exits.
    """
    more = [f"hydra.help.app_name='minigpt {word}'" for word in program.words]
    flags = [index for index, word in enumerate(arguments) if word in ("--help", "-h")]
    words = arguments[flags[0] + 1 :] if flags else []
    if flags and not words:  # fast: without defaults, which import torch
        from hydra.core.config_store import ConfigStore

        ConfigStore.instance().store(f"{name}_defaults", {})
        sys.argv = [program.path, "--help", *more]
        return
    provide_home()
    if flags:
        from minigpt.cli.settings_help import settings_help

        print(settings_help(name, words))
        sys.exit()
    forget_stale_launcher()
    Launcher.detect()  # raises UserError for wrong variables, before Lightning reads them
    allow_starting_processes()
    register_defaults(name, arguments)
    words = composed_words(name, arguments)
    first = first_setting(words)
    sys.argv = [program.path, *words[:first], *more, *words[first:]]


@contextlib.contextmanager
def _one_line_errors(name: str, program: Program) -> Iterator[None]:
    """Exit with one line if a Hydra task raises a `UserError` or an error that can be explained.

    `_leave_explained` explains errors of libraries. Errors without an explanation are raised again.

    In a multirun, a `UserError` or an error of OmegaConf is raised again, so that Hydra continues
    with the next job. Such an error occurs at all ranks. Any other error may have occurred at one
    rank only. Rank 0 also raises it again, but a process with a higher rank prints the traceback
    and exits. If this process raised the error again, Hydra would hide the error, and the other
    ranks would wait for this process.
    """
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        yield
    except UserError as error:
        if multirun:
            raise
        leave(describe(error, program), error.exit_code)
    except Exception as error:
        if not multirun:  # Hydra would print all settings
            _leave_explained(error, name, program)
        elif global_rank() > 0 and not isinstance(error, OmegaConfBaseException):
            traceback.print_exc()
            sys.exit(1)
        raise
