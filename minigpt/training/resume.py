"""Start of a run: random weights, weights of another run, or a checkpoint of the same run."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from minigpt.core.console import log
from minigpt.core.files import refuse_links_out
from minigpt.core.settings import ModelClassError, UserError, flat
from minigpt.core.typed import typed_settings
from minigpt.data.config import DataConfig, with_cache_here
from minigpt.data.datamodule import DataModule
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import is_whole, read_checkpoint
from minigpt.runs.folder import (
    ModelFactory,
    Run,
    config_class,
    last_checkpoint,
    last_checkpoints,
    load_one,
    read_config,
)
from minigpt.runs.names import (
    CHECKPOINTS,
    CONFIG,
    REPORT,
    SNAPSHOTS,
    SUMMARY,
    TENSORBOARD,
    TOKENIZER,
)
from minigpt.runs.provenance import Parent, parent_of
from minigpt.runs.records import read_summary
from minigpt.tokenizer import Tokenizer
from minigpt.training.checkpointing import VALIDATES
from minigpt.training.config import Schedule, TrainConfig, settings_of
from minigpt.training.module import GPTModule
from minigpt.training.profiling import PROFILE
from minigpt.training.teacher import Teachers

AUTO = "auto"  # resume=auto continues the run called config.name, if there is one
_SECTIONS = ("model", "data", "optimizer", "trainer", "budget", "seed")  # in every config.yaml
# Settings that may change when a run is resumed, such as the folder of the run.
_MAY_CHANGE = (
    "name", "runs_dir", "resume", "data.cache_dir", "teacher.runs", "teacher.class_path",
    "model_class", "overrides",
)  # fmt: skip

# Settings that may be typed together with resume=<run>; the teachers may have been moved.
_KEPT = ("resume=", "data.cache_dir=", "teacher=", "teacher.runs=")
_KEPT += ("model.class_path=", "teacher.class_path=")


@dataclasses.dataclass(frozen=True)
class ResumeState:
    """The config of a run and the state from which the run starts.

    A resumed run continues from its checkpoint. A new run starts at step 0. Its weights and its
    tokenizer are those of the run `init_from`; without `init_from`, its weights are random.
    """

    config: TrainConfig
    """All settings of the run. A resumed run uses the settings in its config.yaml. Only the paths
    `data.cache_dir` and `teacher.runs` can be changed when it is resumed."""
    checkpoint: Path | None = None
    """Checkpoint to resume from; None for a new run."""
    step: int = 0
    """Number of updates so far."""
    validates: bool = False
    """Whether the run was stopped during the validation after `step` updates. If so, the resumed
    run repeats this validation."""
    hyper_parameters: dict[str, Any] | None = None
    """Hyperparameters in the checkpoint; None for a new run."""
    parent_model: GPT | None = None
    """Model of the parent run `init_from`; None for random weights and for a resumed run."""
    tokenizer: Tokenizer | None = None
    """Tokenizer to use; None means that a tokenizer is trained on the stories."""
    parent: Parent | None = None
    """Provenance record of the parent run `init_from`; None for a run without `init_from`."""
    teachers: Teachers | None = None
    """The loaded teachers; None for a run without teachers."""

    @classmethod
    def from_config(
        cls, config: TrainConfig, folder: Path | None, model: ModelFactory | None = None,
        teacher: ModelFactory | None = None,
    ) -> ResumeState:  # fmt: skip
        """Return the state from which a run starts.

        Args:
            config: all settings as typed by the user.
            folder: folder of the run to resume; None for a new run. A run that continues from a
                checkpoint keeps the settings in its own config.yaml.
            model: class of the model, or function that creates it; None means `GPT`.
            teacher: class of the teachers, or function that creates them; None means `GPT`.

        Raises:
            UserError: a run, checkpoint or tokenizer is missing or damaged; resume=auto found a run
                with other settings; the weights of `init_from` or the teachers do not fit the
                model; two settings give different tokenizers; data.vocab_size is not the size of
                the tokenizer; or the teachers have changed since the checkpoint.
            ModelClassError: a run was trained with another class than `model` or `teacher`.
        """
        if folder is None or (config.resume == AUTO and not last_checkpoints(folder)):
            return cls._new(config, folder, model, teacher)
        return cls._resumed(config, folder, model, teacher)

    @classmethod
    def _new(
        cls, config: TrainConfig, folder: Path | None, model: ModelFactory | None,
        teacher: ModelFactory | None,
    ) -> ResumeState:  # fmt: skip
        if config.data.source == "hf" and config.data.valid_split == config.data.split:
            problem = "must be another split than data.split; leave it out to hold stories out"
            raise UserError(problem, "data.valid_split", config.data.valid_split)
        teachers = parent = parent_model = run = None
        tokenizer = _typed_tokenizer(config.data)
        tokenizers = {"data.tokenizer": (config.data.tokenizer, tokenizer)}
        if config.teacher.runs:
            if folder is None and config.name is not None:
                folder = Path(config.runs_dir) / config.name
            teachers = Teachers.load(config.teacher.runs, folder, teacher)
            tokenizers["teacher.runs"] = config.teacher.runs[0], teachers.tokenizer
        if config.init_from is not None:
            run = load_one(config.init_from, "init_from", model)
            tokenizers["init_from"] = config.init_from, run.tokenizer
            parent_model = run.load_model()
        if config.data.source == "hf":
            named = [("init_from", config.init_from)] if config.init_from else []
            for name, path in [*named, *(("teacher.runs", p) for p in config.teacher.runs)]:
                _check_division(config.data, Run.load(path).config.get("data"), name, path)
        tokenizer = _common(tokenizers)
        if tokenizer is not None and (config.data.tokenizer or teachers):
            config = _with_vocabulary_of(tokenizer, config)
        if run is not None and parent_model is not None:
            _check_shape(config, parent_model.config, run)
            parent = run.provenance(parent_model)
        if teachers is not None:
            teachers.check_shape(config.model)
        return cls(
            config, parent_model=parent_model, tokenizer=tokenizer, parent=parent, teachers=teachers
        )

    @classmethod
    def _resumed(
        cls, config: TrainConfig, folder: Path, model: ModelFactory | None,
        teacher: ModelFactory | None,
    ) -> ResumeState:  # fmt: skip
        assert config.resume is not None
        if config.resume != AUTO:
            refuse_settings(config)
        checkpoint = last_checkpoint(folder if config.resume == AUTO else Path(config.resume))
        run = Run(folder, checkpoint)
        values = run.config
        if missing := [name for name in _SECTIONS if name not in values]:
            raise UserError(f"{folder / CONFIG} lacks {', '.join(missing)}: restore the file")
        if (name := values.get("model_class")) is not None and model is None:
            problem = f"{folder} was trained with the class {name}, which must be given"
            raise ModelClassError(problem, name)
        before = TrainConfig.from_dict(values, config_class(model or GPT))
        if config.resume == AUTO:
            _check_settings(config, before, folder)
        data = with_cache_here(before.data, config.data.cache_dir)
        content = read_checkpoint(checkpoint)
        stored, step = content["hyper_parameters"], content["global_step"]
        parent = parent_of(stored, checkpoint)  # not from the parent run, which may be deleted
        given = parent or before.data.tokenizer or before.teacher.runs
        if parent is not None:  # an earlier version recorded more or less about the parent
            stored = {**stored, "init_from": dataclasses.asdict(parent)}
        paths = _teacher_paths(config, before, folder, teacher)
        teachers = Teachers.load(paths, folder, teacher) if paths else None
        if teachers is not None:
            teachers = teachers.recorded_in(stored, checkpoint)
        taught_by = dataclasses.replace(before.teacher, runs=paths)
        return cls(
            dataclasses.replace(before, data=data, teacher=taught_by),
            checkpoint,
            step,
            content.get(VALIDATES) is True,
            stored,
            tokenizer=run.tokenizer if given else None,
            parent=parent,
            teachers=teachers,
        )

    def prepared_data(self, schedule: Schedule) -> DataModule:
        """Return the data of the run.

        One process prepares the data while any other processes of the run wait.

        Args:
            schedule: number of updates, and number of tokens in each update.

        Raises:
            UserError: the data cannot be prepared, model.vocab_size is less than the size of the
                tokenizer, or the training split is smaller than a batch of all devices.
        """
        config, accumulate = self.config, self.config.trainer.accumulate_grad_batches
        n_batches, start_batch = schedule.n_steps * accumulate, self.step * accumulate
        length, vocab_size = config.model.context_length, config.model.vocab_size
        data = DataModule(config.data, length, n_batches, config.seed, start_batch, self.tokenizer)
        data.setup("fit")  # also prepares the data; `prepare_data` would read it again
        if (size := data.tokenizer.vocab_size) > vocab_size:
            message = f"is less than the tokenizer's {size} tokens: leave it out, so that "
            message += "data.vocab_size sets it"
            raise UserError(message, "model.vocab_size", vocab_size)
        per_device = length * config.data.windows_per_batch * accumulate
        data.check_batches(world_size=schedule.tokens_per_step // per_device)
        return data

    def with_vocabulary(self, tokenizer: Tokenizer) -> ResumeState:
        """Return the state with the model's vocabulary reduced to the size of `tokenizer`.

        Only a model with random weights is changed, and only if its `vocab_size` equals
        data.vocab_size, the maximum size of the tokenizer.
        """
        model, size = self.config.model, tokenizer.vocab_size
        is_new = self.checkpoint is None and self.parent_model is None
        if not is_new or not size < model.vocab_size == self.config.data.vocab_size:
            return self
        model = dataclasses.replace(model, vocab_size=size)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))

    def module(self, schedule: Schedule, data: DataModule, model: ModelFactory | None) -> GPTModule:
        """Return the Lightning module; with `init_from`, it has the weights of the parent run.

        Args:
            schedule: number of updates, and number of tokens in each update.
            data: the prepared data.
            model: class of the model, or function that creates it; None means `GPT`.

        Raises:
            UserError: data, schedule, model or optimizer changed since the checkpoint.
        """
        extra: dict[str, Any] = {"tokenizer": data.tokenizer.fingerprint}
        extra["train_tokens"] = data.train.n_tokens
        if self.parent is not None:
            extra["init_from"] = dataclasses.asdict(self.parent)
        if self.teachers is not None:
            extra["teachers"] = [dataclasses.asdict(record) for record in self.teachers.records]
        module = GPTModule(
            self.config.model, self.config.optimizer, schedule.n_steps, schedule.tokens_per_step,
            data.valid.bytes_per_token, extra, model or GPT,
        )  # fmt: skip
        if self.parent_model is not None:
            module.net.load_state_dict(self.parent_model.state_dict())
        self._check_unchanged(module)
        return module

    def _check_unchanged(self, module: GPTModule) -> None:
        """Raise UserError if data, schedule, model or optimizer changed since the checkpoint."""
        if self.hyper_parameters is None:
            return
        changed = []
        for key, value in module.hparams.items():
            stored = self.hyper_parameters.get(key)
            if isinstance(value, dict) and isinstance(stored, dict):
                # Ignore settings that are newer than the checkpoint or no longer exist.
                stored = {key: stored.get(key, new) for key, new in value.items()}
            if stored != value:
                changed.append(key)
        if changed:
            message = f"{self.checkpoint} cannot be resumed: {', '.join(changed)} changed"
            remedy = "use the same stories, devices and settings as before, or start a new run"
            raise UserError(f"{message}; {remedy}")

    def clear(self, folder: Path) -> None:
        """Remove the temporary files of a killed process, and rename damaged checkpoints.

        The run resumes from `checkpoint`. Only newer checkpoints are checked for damage. If there
        is no checkpoint, the run starts over, and the results of the earlier attempt are removed.
        """
        if self.checkpoint is None:
            for name in (SUMMARY, REPORT):
                (folder / name).unlink(missing_ok=True)
            for name in (SNAPSHOTS, PROFILE, TENSORBOARD):
                shutil.rmtree(folder / name, ignore_errors=True)
        for pattern in ("*.tmp", f"{CHECKPOINTS}/*.tmp", f"{SNAPSHOTS}/*.tmp"):
            for leftover in folder.glob(pattern):
                leftover.unlink()
        for path in last_checkpoints(folder):
            if path == self.checkpoint:
                break
            if not is_whole(path):  # it must not push an undamaged one out of the rotation
                log.warning("%s is damaged: continuing from %s", path, self.checkpoint)
                path.replace(path.with_name(f"{path.name}.damaged"))


def folder_to_resume(config: TrainConfig) -> Path | None:
    """Return the folder of the run to resume; None if a new run starts.

    Args:
        config: all settings, including `resume`.

    Raises:
        UserError: no run exists at `resume`, `name` is missing for resume=auto, or a link in the
            run folder points outside the folder.
    """
    if config.resume is None:
        return None
    folder = Path(config.resume)
    if config.resume == AUTO:
        if config.name is None:
            raise UserError("needs the name of the run", "resume", AUTO, {"name": "my-run"})
        folder = Path(config.runs_dir) / config.name
        if not folder.is_dir():
            return None
    elif not last_checkpoints(folder):
        folder = last_checkpoint(folder).parent.parent
    refuse_links_out(folder)
    return folder


def _teacher_paths(
    config: TrainConfig, before: TrainConfig, folder: Path, teacher: ModelFactory | None
) -> tuple[str, ...]:
    """Return the paths of the teachers: those in `config` or, if there are none, in `before`.

    Args:
        config: all settings as typed by the user.
        before: settings in the config.yaml of the run to resume.
        folder: folder of the run to resume.
        teacher: class of the teachers, or function that creates them; None means `GPT`.

    Raises:
        UserError: `config` names teachers, but the run was started without teachers.
        ModelClassError: the teachers have a custom class, but `teacher` is None.
    """
    typed, recorded = config.teacher.runs, before.teacher.runs
    if typed and not recorded:
        message = f"the run in {folder} has no teachers: leave this setting out"
        raise UserError(message, "teacher.runs", list(typed))
    if (name := before.teacher.class_path) is not None and teacher is None:
        message = f"the teachers of {folder} have the class {name}, which must be given"
        raise ModelClassError(message, name, "teacher")
    return typed or recorded


def _typed_tokenizer(data: DataConfig) -> Tokenizer | None:
    """Return the tokenizer at the path `data.tokenizer`; None if this setting is None.

    Raises:
        UserError: the tokenizer is missing or damaged.
    """
    name = "data.tokenizer"
    if data.tokenizer is None:
        return None
    path = Path(data.tokenizer).expanduser()
    if path.suffix in (".ckpt", ".safetensors"):
        inside = path.parent.name in (CHECKPOINTS, SNAPSHOTS)
        path = path.parent.parent if inside else path.parent
    file = path if path.suffix == ".json" else path / TOKENIZER
    if not file.is_file():
        message = f"there is no {file}; give a run folder, a checkpoint, an export or a {TOKENIZER}"
        raise UserError(message, name, data.tokenizer)
    try:
        return Tokenizer.load(file)
    except UserError as error:
        raise UserError(error.message, name, data.tokenizer) from None


def _common(tokenizers: dict[str, tuple[str | None, Tokenizer | None]]) -> Tokenizer | None:
    """Return the tokenizer to which all given settings refer; None if no setting is given.

    Args:
        tokenizers: (value, tokenizer) by setting name. The tokenizer is the one to which the value
            refers, or None if the setting is not given.

    Raises:
        UserError: the tokenizers differ.
    """
    named = [(key, value, tok) for key, (value, tok) in tokenizers.items() if tok is not None]
    for key, value, tokenizer in named[:-1]:
        other, other_value, last = named[-1]
        if tokenizer.fingerprint != last.fingerprint:
            problem = f"its tokenizer differs from that of {other}={other_value}"
            problem += ": leave out one of them"
            raise UserError(problem, key, value)
    return named[-1][2] if named else None


def _with_vocabulary_of(tokenizer: Tokenizer, config: TrainConfig) -> TrainConfig:
    """Return `config` with the vocabulary size of `tokenizer`.

    Raises:
        UserError: the user has set data.vocab_size to another size.
    """
    data, model, size = config.data, config.model, tokenizer.vocab_size
    typed = any(word.startswith("data.vocab_size=") for word in config.overrides)
    if data.vocab_size not in (size, None if typed else DataConfig.vocab_size):
        source = data.tokenizer or config.teacher.runs[0]
        message = f"the tokenizer of {source} has {size} tokens: leave this setting out"
        raise UserError(message, "data.vocab_size", data.vocab_size)
    is_typed = any(w.lstrip("+").startswith("model.vocab_size=") for w in config.overrides)
    if model.vocab_size == data.vocab_size and not is_typed:
        model = dataclasses.replace(model, vocab_size=size)
    data = dataclasses.replace(data, vocab_size=size)
    return dataclasses.replace(config, data=data, model=model)


def _check_division(data: DataConfig, before: Any, name: str, path: str) -> None:
    """Raise UserError if validation stories of the new run were training stories of another run.

    The last stories that are read of a Hub dataset are held out. So the other run has read some of
    the new run's validation stories if its training split is longer.

    Args:
        data: settings of the new run.
        before: data settings of the other run, from its config.yaml.
        name: setting that names the other run.
        path: value of this setting.
    """
    if data.valid_split is not None or not isinstance(before, dict):
        return
    same = all(
        before.get(key) == getattr(data, key) for key in ("source", "dataset", "subset", "split")
    )
    if not same or before.get("valid_split") is not None:
        return
    earlier = before.get("download_tokens"), before.get("holdout", DataConfig.holdout)
    lengths = [
        (1 - holdout) * (math.inf if tokens is None else tokens)
        for tokens, holdout in (earlier, (data.download_tokens, data.holdout))
    ]
    if lengths[1] < lengths[0] or (lengths[1] == math.inf and data.holdout > earlier[1]):
        problem = "that run was trained on some of the stories that the new run holds out"
        fix = {"data.download_tokens": earlier[0], "data.holdout": earlier[1]}
        raise UserError(problem, name, path, fix)


def _check_shape(config: TrainConfig, trained: GPTConfig, run: Run) -> None:
    """Raise UserError if the model's shape differs from `trained`, the shape of the parent `run`.

    The context length may differ, because positions are computed, not learned. Dropout may differ,
    because it has no weights. `residual_init` may differ, because it affects only random weights.
    """
    free = "context_length", "dropout", "residual_init"
    fix = {
        f"model.{name}": value
        for name, value in dataclasses.asdict(trained).items()
        if name not in free and getattr(config.model, name, None) != value
    }
    size = run.config.get("size")
    if fix and size not in (None, "gpt", config.size):
        fix = {"model": size}
    if fix:
        problem = "the model of that run differs in shape from the new model"
        raise UserError(problem, "init_from", config.init_from, fix)


def run_lock(folder: Path) -> AcquireReturnProxy:
    """Lock a run, so that only one process trains the run at a time.

    If the process is killed, the lock is released.

    Args:
        folder: the run folder.

    Returns:
        The lock, as a context manager that releases the lock when the `with` block ends.

    Raises:
        UserError: another process trains the run, or the file system supports no locks.
    """
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        message = f"{folder} is being trained by another process: wait, or choose another name"
        raise UserError(message, "name", folder.name) from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        problem = f"cannot lock {folder} ({error}): choose a folder on another file system"
        raise UserError(problem, "runs_dir", str(folder.parent)) from None


def _check_settings(config: TrainConfig, before: TrainConfig, folder: Path) -> None:
    """Raise UserError if `config` differs from `before`, the config of the run in `folder`.

    Settings that may change, such as data.cache_dir, are not compared.
    """
    earlier = flat(settings_of(before))
    by_tokenizer = bool(config.data.tokenizer or config.teacher.runs)
    ignored = {*_MAY_CHANGE, *(["data.vocab_size"] if by_tokenizer else [])}
    size, limit = config.model.vocab_size, config.data.vocab_size
    if size == limit and (by_tokenizer or earlier["model.vocab_size"] <= size):
        ignored.add("model.vocab_size")  # it follows the tokenizer
    values = flat(settings_of(config))
    # The budget first, because data.download_tokens follows it.
    for name in ("budget.tokens", *values):
        value = values[name]
        unset = value is None and name.startswith("logger.")  # W&B's variables may have changed
        if name not in ignored and not unset and earlier[name] != value:
            if name == "budget.tokens" and (
                error := budget_error(folder, config.budget.tokens, config.overrides)
            ):
                raise error
            message = f"the run in {folder} used another value; use that value or another name"
            raise UserError(message, name, value, {name: earlier[name]})


def refuse_settings(config: TrainConfig) -> None:
    """Raise UserError if settings were typed that cannot be combined with resume=<run>."""
    typed = [word for word in config.overrides if not word.lstrip("+").startswith(_KEPT)]
    if not typed:
        return
    folder = folder_to_resume(config)
    assert folder is not None
    own = read_config(folder).get("overrides") or ()
    if not (typed := [word for word in typed if word not in own]):
        return
    larger = any(word.lstrip("+").startswith("budget.tokens=") for word in typed)
    if larger and (error := budget_error(folder, config.budget.tokens)):
        raise error
    raise UserError(f"a resumed run keeps its own settings: leave out {typed[0]}", "resume")


def _is_default(values: dict[str, Any]) -> bool:
    """Return whether the settings in a config.yaml that affect the weights are all defaults."""
    defaults = settings_of(TrainConfig())
    cache = {"cache_dir": None}
    return all(
        {**values[name], **cache} == {**defaults[name], **cache}
        for name in ("model", "data", "optimizer", "trainer")
    )


def budget_error(folder: Path, tokens: int, typed: Sequence[str] | None = None) -> UserError | None:
    """Return the error for resuming a finished run with a larger budget; None in other cases.

    The error suggests a new run with the same settings. The new run starts with the weights of the
    finished run and trains on the additional tokens.

    Args:
        folder: the run folder.
        tokens: budget of the resumed run, in tokens.
        typed: settings as typed; None means the settings that the finished run recorded.
    """
    values, summary = read_config(folder), read_summary(folder)
    trained = summary.get("tokens")
    if summary.get("status") != "finished" or not isinstance(trained, int) or tokens <= trained:
        return None
    words: Sequence[str] = (values.get("overrides") or ()) if typed is None else typed
    replaced = ("name", "resume", "init_from", "budget.tokens", "model.vocab_size")
    rest = [word for word in words if word.partition("=")[0].lstrip("+") not in replaced]
    settings = {"init_from": str(folder), "budget.tokens": tokens - trained}
    if values["data"].get("source") == "hf" and not any("data.download_tokens=" in w for w in rest):
        # With another number of stories, others would be held out.
        settings["data.download_tokens"] = values["data"].get("download_tokens")
    if values["model"].get("vocab_size") != values["data"].get("vocab_size"):
        settings["model.vocab_size"] = values["model"].get("vocab_size")
    message = f"{folder} is finished, after {trained:,} tokens; to continue from its weights"
    if not words and not _is_default(values):  # no command can repeat settings that were not typed
        fix = settings | {"name": f"{folder.name}-continued"}
        return UserError(f"{message}, start a new run", "budget.tokens", tokens, fix)
    command = ("train", [*typed_settings(settings), *rest])
    return UserError(message, "budget.tokens", tokens, command=command)
