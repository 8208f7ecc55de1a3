"""Start of a run: random weights, weights of another run, or a checkpoint of the same run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.core.console import log
from minigpt.core.settings import ModelClassError, UserError
from minigpt.data.config import with_cache_here
from minigpt.data.datamodule import DataModule
from minigpt.model import GPT
from minigpt.runs.checkpoint import is_whole, read_checkpoint
from minigpt.runs.folder import (
    ModelFactory,
    Run,
    config_class,
    last_checkpoint,
    last_checkpoints,
    load_one,
)
from minigpt.runs.names import (
    CHECKPOINTS,
    CONFIG,
    OVER_TIME_ANIMATION,
    OVER_TIME_FIGURE,
    OVER_TIME_TABLE,
    REPORT,
    SNAPSHOTS,
    SUMMARY,
    TENSORBOARD,
)
from minigpt.runs.provenance import Parent, parent_of
from minigpt.runs.records import read_summary
from minigpt.tokenizer import Tokenizer
from minigpt.training.checkpointing import VALIDATES
from minigpt.training.config import Schedule, TrainConfig
from minigpt.training.inheritance import (
    check_division,
    check_shape,
    common_tokenizer,
    typed_tokenizer,
    warn_of_seen_stories,
    with_dependent_settings,
    with_rows_of,
    with_vocabulary_of,
)
from minigpt.training.module import GPTModule
from minigpt.training.profiling import PROFILE
from minigpt.training.resume_settings import (
    AUTO,
    check_settings,
    refuse_settings,
    warn_of_ignored_settings,
)
from minigpt.training.teacher import Teachers

_SECTIONS = ("model", "data", "optimizer", "trainer", "budget", "seed")  # in every config.yaml


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
    is_complete: bool = False
    """Whether the run has finished, and `checkpoint` is its state after the last update."""
    teachers: Teachers | None = None
    """The loaded teachers; None for a run without teachers, and for a complete run unless the user
    has typed some."""

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
        config = with_dependent_settings(config)
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
        sources: list[tuple[str, str, Run]] = []  # setting, its value, and the run
        tokenizer = typed_tokenizer(config.data)
        tokenizers = {"data.tokenizer": (config.data.tokenizer, tokenizer)}
        if config.teacher.runs:
            if folder is None and config.name is not None:
                folder = Path(config.runs_dir) / config.name
            teachers = Teachers.load(config.teacher.runs, folder, teacher)
            tokenizers["teacher.runs"] = config.teacher.runs[0], teachers.tokenizer
            pairs = zip(config.teacher.runs, teachers.runs, strict=True)
            sources += [("teacher.runs", path, source) for path, source in pairs]
        if config.init_from is not None:
            run = load_one(config.init_from, "init_from", model)
            tokenizers["init_from"] = config.init_from, run.tokenizer
            sources.append(("init_from", config.init_from, run))
            parent_model = run.load_model()
        for name, path, source in sources:
            before = source.config.get("data")
            if config.data.source == "hf":
                check_division(config.data, before, name, path)
            warn_of_seen_stories(config.data, before, path)
        tokenizer = common_tokenizer(tokenizers)
        if tokenizer is not None and (config.data.tokenizer or teachers):
            config = with_vocabulary_of(tokenizer, config)
        if run is not None and parent_model is not None:
            config = with_rows_of(parent_model.config, config)
            check_shape(config, parent_model.config, run)
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
        paths = _teacher_paths(config, before, folder, teacher)
        check = check_settings if config.resume == AUTO else warn_of_ignored_settings
        check(config, before, folder)
        data = with_cache_here(before.data, config.data.cache_dir)
        content = read_checkpoint(checkpoint)
        stored, step = content["hyper_parameters"], content["global_step"]
        parent = parent_of(stored, checkpoint)  # not from the parent run, which may be deleted
        given = parent or before.data.tokenizer or before.teacher.runs
        if parent is not None:  # an earlier version recorded more or less about the parent
            stored = {**stored, "init_from": dataclasses.asdict(parent)}
        is_complete, teachers = _is_complete(folder, content), None
        if paths and (config.teacher.runs or not is_complete):
            teachers = _teachers_again(paths, config, folder, teacher)
            teachers = teachers.recorded_in(stored, checkpoint, paths)
        taught_by = dataclasses.replace(before.teacher, runs=paths)
        return cls(
            dataclasses.replace(before, data=data, teacher=taught_by),
            checkpoint,
            step,
            content.get(VALIDATES) is True,
            stored,
            tokenizer=run.tokenizer if given else None,
            parent=parent,
            is_complete=is_complete,
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
            for name in (SUMMARY, REPORT, OVER_TIME_TABLE, OVER_TIME_FIGURE, OVER_TIME_ANIMATION):
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


def _is_complete(folder: Path, checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a run has finished, and `checkpoint` is its state after the last update."""
    n_steps = checkpoint["hyper_parameters"]["n_steps"]
    if checkpoint["global_step"] < n_steps or checkpoint.get(VALIDATES) is True:
        return False  # without reading the summary: if it is damaged, the resumed run replaces it
    return read_summary(folder).get("status") == "finished"


def _teachers_again(
    paths: tuple[str, ...], config: TrainConfig, folder: Path, teacher: ModelFactory | None
) -> Teachers:
    """Load the teachers of a run that continues; if one is gone, say how to name its new path."""
    try:
        return Teachers.load(paths, folder, teacher)
    except ModelClassError:
        raise
    except UserError as error:
        if config.teacher.runs:  # typed by the user
            raise
        problem = f"{error.message}; if a teacher was moved, give the new path of each teacher"
        names = [f"new/path/{Path(path).name}" for path in paths]
        words = {"resume": str(folder), "teacher.runs": names}
        raise UserError(problem, "teacher.runs", error.value, command=("train", words)) from None


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
        UserError: `config` names teachers, but the run was started without teachers; or it names
            none for resume=auto, but the run has some.
        ModelClassError: the teachers have a custom class, but `teacher` is None.
    """
    typed, recorded = config.teacher.runs, before.teacher.runs
    if typed and not recorded:
        message = f"the run in {folder} has no teachers: leave this setting out"
        raise UserError(message, "teacher.runs", list(typed))
    if recorded and not typed and config.resume == AUTO:
        message = f"the run in {folder} has teachers: name them, or choose another name"
        raise UserError(message, "teacher.runs", [], {"teacher.runs": list(recorded)})
    if (name := before.teacher.class_path) is not None and teacher is None:
        message = f"the teachers of {folder} have the class {name}, which must be given"
        raise ModelClassError(message, name, "teacher")
    return typed or recorded
