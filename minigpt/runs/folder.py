"""Run folders and the models in them.

>>> run = Run.load("runs/small-20260101-120000")  # a run, a checkpoint file in it, or an export
>>> model, tokenizer = run.load_model(), run.tokenizer
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from minigpt.core.console import log
from minigpt.core.distributed import global_rank
from minigpt.core.files import read_yaml, refuse_links_out, user_path
from minigpt.core.settings import ModelClassError, UserError, build
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import (
    is_whole,
    read_checkpoint,
    read_model,
    read_safetensors,
    weights_fingerprint,
    with_weights,
)
from minigpt.runs.names import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    LAST,
    SNAPSHOTS,
    SUMMARY,
    TOKENIZER,
    WEIGHTS,
)
from minigpt.runs.provenance import Parent, averaged_runs, parent_of, teachers_of
from minigpt.runs.records import read_summary
from minigpt.tokenizer import Tokenizer

_folders = itertools.count()  # number of each new run of this process
RUN_FOLDER_VARIABLE = "MINIGPT_RUN_FOLDER"  # passes the folder to processes that rank 0 starts
ModelFactory = Callable[[Any], GPT]  # subclass of GPT, or a function from config to model

# Values for settings that are missing in the config.yaml of an older run: the defaults as of commit
# c2cfd24. OLD_SETTINGS are settings that no longer exist.
OLD_DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"d_model": 256, "n_heads": 8, "d_ff": 512, "residual_init": "scaled"},
    "data": {"batch_size": 32, "shuffle": "windows", "noise": 0.0},
    "optimizer": {
        "schedule": "cosine",
        "cycles": 0,
        "final_weight_decay": None,
        "normalize_rows": None,
        "follow_batch": False,
    },
    "trainer": {"cuda_graph": False},
}
OLD_SETTINGS = {"model": ("attention",)}


@dataclass(frozen=True)
class Run:
    """Run folder with a selected checkpoint; config, tokenizer and summary are read only once.

    Args:
        folder: the run folder, or the folder of a model exported in the format safetensors.
        checkpoint: file of the selected checkpoint, or of the weights in the export.
        model: class of the model, or a function that creates the model from its config; None means
            `GPT`.
    """

    folder: Path
    checkpoint: Path
    model: ModelFactory | None = None

    @classmethod
    def load(cls, path: str | Path | Run, model: ModelFactory | None = None) -> Run:
        """Return the run at `path`.

        For a run folder, the best checkpoint is selected, or the last one if there is no best
        checkpoint. Damaged checkpoints are skipped with a warning.

        Args:
            path: a run folder, a folder of runs (the newest run is selected), a checkpoint or
                snapshot in a run folder, or an exported model. A `Run` is returned unchanged.
            model: class of the model, or a function that creates the model from its config; None
                means `GPT`.

        Returns:
            The run, with the selected checkpoint. `load_model` loads its model.

        Raises:
            UserError: there is no run or no checkpoint at `path`, or the run folder contains a
                link to a path outside the run folder.
        """
        if isinstance(path, Run):
            return path if model is None else replace(path, model=model)
        path = user_path(path)
        if path.is_dir():
            best, weights = path / CHECKPOINTS / f"{BEST}.ckpt", path / WEIGHTS
            if checkpoints := [*([best] if best.is_file() else []), *last_checkpoints(path)]:
                refuse_links_out(path)
                return cls(path, first_undamaged(checkpoints), model)
            if weights.is_file():
                return cls(path, weights, model)
            newest = max(path.glob(f"*/{CHECKPOINTS}/*.ckpt"), key=os.path.getmtime, default=None)
            if newest is not None:
                return cls.load(newest.parent.parent, model)
            names = f"{CHECKPOINTS}/{BEST}.ckpt, {LAST}.ckpt or {WEIGHTS}"
            raise UserError(f"{path} has no {names}: give a run folder, or train a model first")
        if not path.is_file() or path.suffix not in (".ckpt", ".safetensors"):
            fault = "is not a checkpoint" if path.is_file() else "does not exist"
            allowed = (
                "a run folder (runs/<name>), an export with --format safetensors, or a .ckpt file"
            )
            raise UserError(f"{path} {fault}: give {allowed}")
        is_snapshot = path.parent.name == SNAPSHOTS and path.name != WEIGHTS
        if path.parent.name != CHECKPOINTS and not is_snapshot:
            return cls(path.parent, path, model)
        refuse_links_out(path.parent.parent)
        return cls(path.parent.parent, path, model)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Settings of the run in config.yaml, as plain values.

        Raises:
            UserError: config.yaml is missing or damaged.
        """
        return read_config(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer that the run was trained with.

        Raises:
            UserError: tokenizer.json is missing or damaged.
        """
        if not (path := self.folder / TOKENIZER).is_file():
            fix = "give a run folder with all its files"
            raise UserError(f"{self.folder} has no {TOKENIZER}: {fix}")
        return Tokenizer.load(path)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json, with the steps, tokens and seconds of the selected checkpoint.

        A run that is still training or was killed may have no summary.json. The summary then
        contains only the three values above and, if there are any, the records of the parent run
        and of the teachers. If the selected checkpoint is a snapshot, the seconds may be missing,
        because a snapshot does not record them. For a snapshot before the end, the status is
        "training".

        Raises:
            UserError: summary.json or the checkpoint is damaged.
        """
        summary = read_summary(self.folder)
        if self.is_export:
            return summary
        content = read_checkpoint(self.checkpoint)
        stored, steps = content["hyper_parameters"], content["global_step"]
        for key in ("init_from", "teachers"):
            if key in stored:
                summary = {**summary, key: stored[key]}
        if steps == summary.get("steps"):
            return summary
        summary.pop("cycles", None)  # only the final weights are a mean over cycles
        summary.pop("seconds", None)
        with contextlib.suppress(KeyError, TypeError, ValueError):
            summary["seconds"] = round(float(content["callbacks"]["Throughput"]["seconds"]), 1)
        per_step = stored.get("tokens_per_step")
        if self.checkpoint.parent.name == SNAPSHOTS:
            summary["status"] = "training"
        return {**summary, "steps": steps, "tokens": per_step and steps * per_step}

    @property
    def snapshots(self) -> list[Path]:
        """Paths of the snapshots of the weights, sorted by step; [] if there are none."""
        paths = (self.folder / SNAPSHOTS).glob("step-*.safetensors")
        return sorted(paths, key=lambda path: (len(path.name), path.name))

    @property
    def is_export(self) -> bool:
        """Whether this is an export in the format safetensors instead of a run folder."""
        return self.checkpoint.suffix == ".safetensors" and self.checkpoint.parent == self.folder

    @property
    def output_dir(self) -> Path:
        """Directory for evaluation output: the run folder; for an export, the current directory.

        No file is added to an export, because its model card describes exactly the files in it.
        """
        return Path() if self.is_export else self.folder

    def load_model(self, device: str | torch.device = "cpu") -> GPT:
        """Return the model with the weights of the selected checkpoint.

        Only tensors and plain values are read; a checkpoint that contains code is rejected without
        running the code.

        Args:
            device: device of the weights.

        Returns:
            The model in float32, frozen and in evaluation mode.

        Raises:
            UserError: the checkpoint is damaged, or belongs to another run.
            ModelClassError: the run was trained with a custom class that was not given, or with
                another class than the given one.
        """
        if (trained := self.config.get("model_class")) is not None and self.model is None:
            problem = f"{self.folder} was trained with the class {trained}, which must be given"
            raise ModelClassError(problem, trained)
        factory = self.model or GPT
        shape = build(config_class(factory), _current(self.config.get("model"), "model"), "model")
        if self.is_export:
            weights = read_safetensors(self.checkpoint)
        else:
            stored, weights = read_model(self.checkpoint)
            if build(type(shape), _current(stored, "model"), "model") != shape:
                fix = "give a checkpoint that was written in this folder"
                raise UserError(f"{self.checkpoint} does not match {CONFIG}: {fix}")
        model = with_weights(factory(shape), weights, self.checkpoint)
        trained = trained or class_path(GPT)
        name = class_path(factory)
        if not same_class(name, trained):
            raise ModelClassError(f"{self.folder} was trained with {trained}, not {name}", trained)
        return model.to(device).eval().requires_grad_(False)

    def provenance(self, model: GPT) -> Parent:
        """Return a record of this run, to be stored in the folders of runs that depend on it.

        A dependent run starts with the weights of this run, or has this run as a teacher.

        Args:
            model: the model of this run.

        Raises:
            UserError: config.yaml or summary.json lacks the record of the training.
        """
        summary, path = self.summary, self.folder / SUMMARY
        parent = parent_of(summary, path)

        def total(name: str) -> Any:
            own, before = summary.get(name), getattr(parent, name) if parent else 0
            return None if own is None or before is None else before + own

        of_branches = [source for run in averaged_runs(summary, path) for source in run.sources]
        try:
            own = self.config["data"]["source"]
            entry = {
                "name": self.folder.resolve().name,
                "weights": weights_fingerprint(model),
                "tokens": total("tokens"),
                "seconds": total("seconds"),
                "sources": [*(parent.sources if parent else []), own, *of_branches],
                "teachers": teachers_of(summary, path),
            }
        except (KeyError, TypeError):
            message = f"{self.folder} has no record of its training"
            raise UserError(f"{message}: restore its {CONFIG} and {SUMMARY}") from None
        return build(Parent, entry, f"{self.folder}")


def bundled_release(name: str = "w64") -> Path:
    """Return the folder of a released model in this checkout.

    The release `w64` also contains snapshots of the weights during its training.

    Args:
        name: name of the folder in releases/.

    Raises:
        UserError: there is no such release, for example because the package was installed without
            the repository.
    """
    path = Path(__file__).parents[2] / "releases" / name
    if not (path / WEIGHTS).is_file():
        raise UserError(f"there is no bundled model {path}: give a run folder (runs/<name>)")
    return path


def class_path(factory: ModelFactory) -> str:
    """Return the dotted path of a model class or function, such as minigpt.model.GPT."""
    return f"{factory.__module__}.{getattr(factory, '__qualname__', repr(factory))}"


def load_one(path: str, argument: str, model: ModelFactory | None = None) -> Run:
    """Return the run that a setting names; its newest run would change when runs are added.

    Args:
        path: a path as for `Run.load`, but not a folder that contains several runs.
        argument: name of the setting, for the error.
        model: class of the model, or function that creates it; None means `GPT`.

    Raises:
        UserError: as `Run.load`, or `path` is a folder of runs.
        ModelClassError: as `Run.load`.
    """
    try:
        run = Run.load(path, model)
    except UserError as error:
        if error.argument is not None:
            raise
        raise UserError(error.message, argument, path, error.fix, error.command) from None
    folder = user_path(path)
    if folder.is_dir() and folder.resolve() != run.folder.resolve():
        raise UserError(f"this is a folder of runs: name one, as {run.folder}", argument, path)
    return run


def with_factory(runs: Sequence[Run], model: ModelFactory | None) -> list[Run]:
    """Return the runs with `model` as the factory of their models.

    Only runs that were trained with a custom class get it or, if there are none, all runs.
    """
    custom = [run for run in runs if run.config.get("model_class") is not None] or runs
    return [replace(run, model=model) if run in custom else run for run in runs]


def same_class(path: str, other: str) -> bool:
    """Return whether two dotted paths name the same class; its module may have been renamed."""
    return path.rpartition(".")[2] == other.rpartition(".")[2]


def config_class(factory: ModelFactory) -> type[GPTConfig]:
    """Return the class of the config that `factory` takes."""
    return getattr(factory, "config_class", GPTConfig)


def last_checkpoints(folder: Path) -> list[Path]:
    """Return the paths of last.ckpt, last-1.ckpt, ... in a run folder, newest first."""
    paths = (folder / CHECKPOINTS).glob(f"{LAST}*.ckpt")
    matches = ((re.fullmatch(rf"{LAST}(?:-(\d+))?", path.stem), path) for path in paths)
    ages = [(int(match[1] or 0), path) for match, path in matches if match]
    return [path for _, path in sorted(ages)]


def first_undamaged(checkpoints: list[Path]) -> Path:
    """Return the first undamaged checkpoint; if all are damaged, the first one."""
    for checkpoint in checkpoints:
        if is_whole(checkpoint):
            return checkpoint
        log.warning("%s is damaged and was skipped", checkpoint)
    return checkpoints[0]  # reading it reports the damage


def last_checkpoint(path: Path) -> Path:
    """Return the checkpoint to resume from.

    Args:
        path: a checkpoint file, or a run folder. For a folder, the newest undamaged checkpoint is
            returned; if all are damaged, the newest one.

    Returns:
        The path of the checkpoint file.

    Raises:
        UserError: there is no checkpoint at `path`, or the file contains only weights.
    """
    if checkpoints := last_checkpoints(path):
        return first_undamaged(checkpoints)
    if path.is_dir():
        path = path / CHECKPOINTS / f"{LAST}.ckpt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a run folder with a checkpoint")
    if path.suffix == ".safetensors":
        problem = "contains only weights, which are not enough to resume a run"
        raise UserError(f"{path} {problem}: give a run folder or a .ckpt file")
    return path


def new_run_folder(parent: Path, name: str | None, size: str, exist_ok: bool = False) -> Path:
    """Create the folder of a new run and return its path; all processes of the run share it.

    The process of rank 0 creates the folder. It passes the path to the other processes through the
    store of torchrun, or in the environment of processes that Lightning starts. If the processes
    were started in another way, such as by srun, `name` is required.

    Args:
        parent: folder of all runs, created if missing.
        name: name of the run; None means a name from model size and time.
        size: name of the model size.
        exist_ok: whether a folder called `name` may already exist, for example because the run was
            started before and killed early.

    Returns:
        The path of the folder, the same in all processes.

    Raises:
        UserError: the folder exists or cannot be created, or `name` is missing.
    """
    store = next(rendezvous("env://"))[0] if "TORCHELASTIC_RUN_ID" in os.environ else None
    key = f"{RUN_FOLDER_VARIABLE} {next(_folders)}"  # a process may train several runs
    if global_rank() == 0:
        folder = _make_run_folder(parent, name, size, exist_ok)
        os.environ[RUN_FOLDER_VARIABLE] = str(folder)
        if store is not None:
            store.set(key, str(folder))
        return folder
    if store is not None:
        return Path(store.get(key).decode())  # blocks until rank 0 has set it
    if RUN_FOLDER_VARIABLE in os.environ:
        return Path(os.environ[RUN_FOLDER_VARIABLE])
    if name is None:
        raise UserError("must be set, so that all processes of the run use the same folder", "name")
    return parent / name


def _make_run_folder(parent: Path, name: str | None, size: str, exist_ok: bool) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot create this folder ({error.strerror}): choose another one"
        raise UserError(problem, "runs_dir", str(parent)) from None
    base = name or f"{size}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 1000):
        folder = parent / (base if attempt == 1 else f"{base}-{attempt}")
        try:
            folder.mkdir(exist_ok=exist_ok and name is not None)
            return folder
        except FileExistsError:
            if name is None:
                continue
        resume: dict[str, Any] = {"fix": {"resume": "auto"}}  # starts again in the same folder
        if last_checkpoints(folder):
            resume = {"command": ("train", {"resume": str(folder)})}
        message = f"{folder} already exists; choose another name, or resume this run"
        raise UserError(message, "name", name, **resume)
    raise UserError(
        f"{parent} has too many folders named {base}-<number>: choose another name", "name"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings in the config.yaml of a run folder as plain values.

    Settings that are missing in an older run get the values in OLD_DEFAULTS. Settings in
    OLD_SETTINGS are removed.

    Args:
        folder: the run folder.

    Returns:
        The settings, nested by section.

    Raises:
        UserError: config.yaml is missing or damaged.
    """
    path = folder / CONFIG
    try:
        config = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: give a run folder (runs/<name>)") from None
    except (OSError, ValueError):  # not YAML, or not even UTF-8
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a dictionary of settings: restore it, or train again")
    return config | {key: _current(config[key], key) for key in OLD_DEFAULTS if key in config}


def _current(values: Any, section: str) -> Any:
    """Return the settings of a section, adapted to the current version.

    Settings in OLD_SETTINGS are removed. Missing settings get the values in OLD_DEFAULTS.

    Args:
        values: the settings by name. Anything but a mapping is returned unchanged.
        section: name of the section, such as "model".
    """
    if not isinstance(values, Mapping):
        return values
    removed = OLD_SETTINGS.get(section, ())
    current = {key: value for key, value in values.items() if key not in removed}
    return {**OLD_DEFAULTS[section], **current}
