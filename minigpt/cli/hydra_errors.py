"""One-line explanations of Hydra's and OmegaConf's errors, and of the failures in `FAILURES`."""

from __future__ import annotations

import re

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException, OverrideParseException

from minigpt.cli.exits import explain_file_error
from minigpt.core.settings import UserError, flat, unknown_name

REFERENCE = r"${...} refers to another setting: type \${ for the characters themselves"


def explain(error: Exception, name: str) -> UserError:
    """Return a UserError for a Hydra or OmegaConf error: what is wrong and what to type instead.

    Args:
        error: the error from composing or reading the root config.
        name: name of the root config.
    """
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(str(error.missing_cfg_file), name)
    if isinstance(error, OverrideParseException):
        key, equals, _ = str(error.override).partition("=")
        if key and equals:
            return _unknown_setting(key, name)
        problem = f"cannot read '{error.override}'"
        return UserError(f"{problem}: type settings as key=value, lists as 'key=[a,b]'")
    unknown = (
        re.search(r"Could not override '([^']+)'", text)
        or re.search(r"Key '([^']+)' is not in struct", text)
        or re.search(r"No match in the defaults list.*\n?.*'([^']+)'", text)
    )
    if unknown:
        return _unknown_setting(unknown.group(1).lstrip("+"), name)
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        setting = missing.group(1)
        return UserError(f"is not set: type {setting}=<value>", setting)
    reason = " ".join(" ".join(text.split("\n")[:2]).split())  # later lines list Hydra's own types
    return UserError(f"{reason}; {REFERENCE}" if "nterpolation" in reason else reason)


def _unknown_setting(setting: str, name: str) -> UserError:
    """Return the error for a setting that the root config `name` does not have."""
    if name == "evaluate" and setting.startswith("data."):
        return UserError("cannot change the run's own data; for other data, add data=text", setting)
    return UserError(unknown_name(setting, setting_names(name)), setting)


def _unknown_option(file: str, name: str) -> UserError:
    """Return the error for an unknown option of a config group.

    Args:
        file: group and option, such as model/tiny. The option may contain slashes.
        name: name of the root config.
    """
    group, _, option = file.rpartition("/")
    groups = _groups(name)
    while group and group not in groups:  # the option contains a slash
        group, _, above = group.rpartition("/")
        option = f"{above}/{option}"
    options = [f"{group}={one}" for one in groups.get(group, [])]
    return UserError(unknown_name(f"{group}={option}", options, "option"), group, option)


def setting_names(name: str) -> list[str]:
    """Return the names of all config groups and settings, such as data.batch_size."""
    from minigpt.cli.compose import defaults

    return sorted({*flat(defaults(name, ["data=text"])), *_groups(name)})


def _groups(name: str) -> dict[str, list[str]]:
    """Return the options of each config group, from Hydra's config loader."""
    from minigpt.cli.compose import own_hydra

    with own_hydra(name):
        loader = GlobalHydra.instance().config_loader()
        names = [*loader.get_group_options("", ObjectType.GROUP), "hydra/launcher", "hydra/sweeper"]
        return {name: sorted(loader.get_group_options(name)) for name in names if name != "hydra"}


FAILURES = {
    # pattern of the error: explanation and advice
    "Connection (closed|reset) by peer": "another process of this run has failed: if its error is "
    "not above, try trainer.devices=1",
    r"Unknown plugin class : 'hydra_plugins\.hydra_(?P<name>\w+)_launcher": "hydra/launcher needs "
    r"another package: run pip install hydra-\g<name>-launcher",
    "^Config group override must be a string": "a setting has no name: type settings as key=value",
    'Could not detect "srun"': "srun is not installed: run this on a machine that submits jobs "
    "to a Slurm cluster",
    "sbatch: (error|fatal): (?P<reason>.*)": r"sbatch failed (\g<reason>): check the settings "
    "hydra.launcher.*, or leave out hydra/launcher",
    "Could not find any running Ray instance": "no Ray cluster is running: run ray start --head, "
    "or set hydra.launcher.ray.init.address=local",
}


_LESS_MEMORY = {
    "train": "set a smaller data.batch_size, model.context_length or model",
    "evaluate": "set a smaller batch_size, or put CUDA_VISIBLE_DEVICES= before the command to use "
    "the CPU",
}


def explain_failure(error: Exception, name: str = "train") -> str | None:
    """Return one line of advice about an error of the system or a library, or None.

    PyTorch raises RuntimeError for most failures, so a lack of memory is recognised by the message
    of the error.

    Args:
        error: the error.
        name: name of the root config, train or evaluate.
    """
    if problem := explain_file_error(error):
        return problem
    if re.search("can't allocate memory|(out of|not enough) memory", str(error)):
        return f"not enough memory: {_LESS_MEMORY[name]}"
    if any(base.__name__ == "BackendCompilerFailed" for base in type(error).__mro__):
        problem = "torch.compile failed, perhaps for lack of a compiler or of Python's headers"
        return f"{problem}: set trainer.compile=false"
    for pattern, advice in FAILURES.items():
        if match := re.search(pattern, str(error)):
            return match.expand(advice)
    return None
