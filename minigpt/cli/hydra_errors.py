"""How train.py and evaluate.py start: Hydra's errors, and ours, in one line that helps.

Nothing heavy is imported here, so that `--help` and a mistyped setting are answered at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from minigpt.core.console import show_log
from minigpt.core.distributed import global_rank
from minigpt.core.settings import UserError, one_line, unknown_name

# Hydra's own options; everything else on the command line is a setting, without dashes.
HYDRA_FLAGS = {
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run",
    "--multirun", "--shell-completion", "--config-path", "--config-name", "--config-dir",
    "--experimental-rerun", "--info",
}  # fmt: skip


def run_app(main: Callable[[], Any], conf: Path, name: str) -> None:
    """Run the Hydra app `main`, whose root config is conf/<name>.yaml.

    What the user got wrong is one line on stderr and exit code 2; ctrl-C is exit code 130.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, where it would print and exit
    # The plugins of Slurm and Ray bring configs of the names of ours, with the same keys.
    warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore")
    # The signal before a Slurm job's time is over: that one which training answers itself.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    show_log()
    try:
        _check_dashes(sys.argv[1:])
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        _leave(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _leave(explain(error, conf, name))
    except (RuntimeError, ConnectionError, ValueError) as error:
        reason = explain_failure(error)
        if reason is None:
            raise
        _leave(reason)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
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
            _leave(str(error))
        _leave(str(error).partition("\n")[0])  # behind it OmegaConf tells of its own types
    except Exception:
        if multirun and global_rank() > 0:
            traceback.print_exc()
            sys.exit(1)
        raise


def explain(error: Exception, conf: Path, name: str) -> str:
    """One line for an error of Hydra or OmegaConf: what was wrong and what to type instead."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        while not (conf / group).is_dir() or ".." in group:  # the option is a path
            group, _, above = group.rpartition("/")
            option = f"{above}/{option}"
        options = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        return unknown_name(f"{group}={option}", [f"{group}={o}" for o in options], "option")
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read '{error.override}': settings are typed as key=value, lists as key=[a,b]"
        )
    key = re.search(r"Could not override '([^']+)'", text) or re.search(
        r"Key '([^']+)' is not in struct", text
    )
    if key:
        setting = key.group(1).lstrip("+")
        group = setting.partition(".")[0]
        files = sorted((conf / group).glob("*.yaml"))
        having = [file.stem for file in files if setting in _keys(file, f"{group}.")]
        if having:
            add = f"{group}={' or '.join(having)}"
            return f"{setting} is not a setting of the chosen {group}: add {add}"
        return unknown_name(setting, setting_names(conf, name))
    no_group = re.search(r"No match in the defaults list.*\n?.*'([^']+)'", text)
    if no_group:
        return unknown_name(no_group.group(1), setting_names(conf, name))
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)} is not set: type {missing.group(1)}=<value>"
    return text


def explain_failure(error: Exception) -> str | None:
    """One line for what this machine lacks, memory, a launcher's package or its cluster; or None.

    Of PyTorch's many errors only those of memory are told apart, by their words.
    """
    text = str(error)
    if re.search("can't allocate memory|(out of|not enough) memory", text):
        return (
            "not enough memory for this: take a smaller data.batch_size, model.context_length "
            "or model"
        )
    plugin = re.search(r"Unknown plugin class : 'hydra_plugins\.hydra_(\w+)_launcher", text)
    if plugin:
        extra = {"submitit": "slurm"}.get(plugin.group(1), plugin.group(1))
        return f"hydra/launcher needs other packages: pip install -e '.[{extra}]'"
    if text.startswith("Config group override must be a string"):
        return "a setting has no name: settings are typed as key=value"
    if 'Could not detect "srun"' in text:
        return "there is no srun here: type this where jobs of a Slurm cluster are submitted"
    if "Could not find any running Ray instance" in text:
        return (
            "no Ray cluster runs here: start one with ray start --head, or type "
            "hydra.launcher.ray.init.address=local"
        )
    return None


def setting_names(conf: Path, name: str) -> list[str]:
    """All that can be set on the command line: groups, and the keys inside them, dotted."""
    names = set(_keys(conf / f"{name}.yaml", ""))
    for folder in (path for path in conf.iterdir() if path.is_dir() and path.name != "hydra"):
        names.add(folder.name)
        if folder.name != "experiment":  # its files set keys of the other groups
            for path in folder.glob("*.yaml"):
                names.update(_keys(path, f"{folder.name}."))
    return sorted(names)


def _keys(path: Path, prefix: str) -> list[str]:
    def walk(node: dict[str, Any], prefix: str) -> list[str]:
        found = []
        for key, value in node.items():
            if key in ("defaults", "hydra"):
                continue
            found += walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
        return found

    return walk(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, prefix)


def _check_dashes(arguments: list[str]) -> None:
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        dashed = flag.startswith("--") and flag not in HYDRA_FLAGS
        if dashed or (flag.startswith("-") and equals and not flag.startswith("--")):
            value = value if equals else following
            typed = f"{flag.lstrip('-')}={value or '<value>'}"
            raise UserError(f"settings are typed without dashes: type {typed}, not {argument}")


def _leave(message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)
