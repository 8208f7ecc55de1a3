"""Errors of Hydra and OmegaConf, and of what a machine lacks, in one line that helps."""

from __future__ import annotations

import re

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException, OverrideParseException

from minigpt.core.settings import flat, unknown_name


def explain(error: Exception, name: str) -> str:
    """Return one line for an error of Hydra or OmegaConf: what was wrong and what to type instead.

    Args:
        error: what was raised while the root config `name` was composed or read.
        name: of the root config.
    """
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(str(error.missing_cfg_file), name)
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}': type settings as key=value, lists as key=[a,b]"
    unknown = (
        re.search(r"Could not override '([^']+)'", text)
        or re.search(r"Key '([^']+)' is not in struct", text)
        or re.search(r"No match in the defaults list.*\n?.*'([^']+)'", text)
    )
    if unknown:
        setting = unknown.group(1).lstrip("+")
        if name == "evaluate" and setting.startswith("data."):
            return f"{setting} is a setting of another corpus than the run's: add data=text"
        return unknown_name(setting, setting_names(name))
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)} is not set: type {missing.group(1)}=<value>"
    return " ".join(text.split("\n")[:2])  # behind it Hydra lists its own types


def _unknown_option(file: str, name: str) -> str:
    """One line for an option that its group does not have, such as model/tiny."""
    group, _, option = file.rpartition("/")
    groups = _groups(name)
    while group and group not in groups:  # the option is a path
        group, _, above = group.rpartition("/")
        option = f"{above}/{option}"
    options = [f"{group}={one}" for one in groups.get(group, [])]
    return unknown_name(f"{group}={option}", options, "option")


def setting_names(name: str) -> list[str]:
    """Return all that can be set on the command line: groups, and the keys in them, dotted."""
    from minigpt.cli.compose import defaults

    return sorted({*flat(defaults(name, ["data=text"])), *_groups(name)})


def _groups(name: str) -> dict[str, list[str]]:
    """The options of each group, as Hydra's config loader finds them."""
    from minigpt.cli.compose import own_hydra

    with own_hydra(name):
        loader = GlobalHydra.instance().config_loader()
        names = [*loader.get_group_options("", ObjectType.GROUP), "hydra/launcher", "hydra/sweeper"]
        return {name: sorted(loader.get_group_options(name)) for name in names if name != "hydra"}


FAILURES = {  # what an error says, and what to do about it
    "can't allocate memory|(out of|not enough) memory": "not enough memory for this: take a "
    "smaller data.batch_size, model.context_length or model",
    r"Unknown plugin class : 'hydra_plugins\.hydra_(?P<name>\w+)_launcher": "hydra/launcher needs "
    r"another package: pip install hydra-\g<name>-launcher",
    "^Config group override must be a string": "a setting has no name: settings are typed as "
    "key=value",
    'Could not detect "srun"': "there is no srun here: type this where jobs of a Slurm cluster are "
    "submitted",
    "Could not find any running Ray instance": "no Ray cluster runs here: start one with ray start "
    "--head, or type hydra.launcher.ray.init.address=local",
}


def explain_failure(error: Exception) -> str | None:
    """One line for what this machine lacks, memory, a launcher's package or its cluster; or None.

    Of PyTorch's many errors only those of memory are told apart, by their words.
    """
    for pattern, advice in FAILURES.items():
        if match := re.search(pattern, str(error)):
            return match.expand(advice)
    return None
