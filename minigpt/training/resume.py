"""Start of a run: random weights, weights of another run, or a checkpoint of the same run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from minigpt.core.console import log
from minigpt.core.files import refuse_links_out
from minigpt.core.settings import ModelClassError, UserError, build, flat
from minigpt.data.config import DataConfig, with_cache_here
from minigpt.data.datamodule import DataModule
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import is_whole, read_checkpoint, weights_fingerprint
from minigpt.runs.folder import ModelFactory, Run, config_class, last_checkpoint, last_checkpoints
from minigpt.runs.names import CHECKPOINTS, CONFIG, SUMMARY, TOKENIZER
from minigpt.runs.provenance import Parent, parent_of
from minigpt.tokenizer import Tokenizer
from minigpt.training.checkpointing import VALIDATES
from minigpt.training.config import Schedule, TrainConfig, settings_of
from minigpt.training.module import GPTModule

AUTO = "auto"  # resume=auto continues the run called config.name, if there is one
_SECTIONS = ("model", "data", "optimizer", "trainer", "budget", "seed")  # in every config.yaml
# Settings that may change between the parts of a run, such as its location.
_MAY_CHANGE = ("name", "runs_dir", "resume", "data.cache_dir", "model_class", "overrides")


@dataclasses.dataclass(frozen=True)
class ResumeState:
    """The config of a run and the state from which the run starts.

    A run without a checkpoint starts at step 0. With `init_from`, it starts with the weights and
    the tokenizer of another run; otherwise it starts with random weights.
    """

    config: TrainConfig
    """All settings; for a resumed run, the settings in its config.yaml."""
    checkpoint: Path | None = None
    """Checkpoint to resume from; None for a new run."""
    step: int = 0
    """Number of updates so far."""
    validates: bool = False
    """Whether the run was stopped during the validation after this step, which is repeated."""
    hyper_parameters: dict[str, Any] | None = None
    """Hyperparameters in the checkpoint; None for a new run."""
    parent_model: GPT | None = None
    """Model of the parent run; None for random weights and for a resumed run."""
    tokenizer: Tokenizer | None = None
    """Tokenizer to use; None means that a tokenizer is trained on the stories."""
    parent: Parent | None = None
    """Provenance record of the parent run; None for a run without a parent."""

    @classmethod
    def from_config(
        cls, config: TrainConfig, folder: Path | None, model: ModelFactory | None = None
    ) -> ResumeState:
        """Return the state from which a run starts.

        Args:
            config: all settings as typed by the user.
            folder: folder of the run to resume, which keeps its own settings; None for a new run.
            model: class of the model, or function that creates it; None means `GPT`.

        Raises:
            UserError: there is no checkpoint to resume, resume=auto found a run with other
                settings, or the weights of `init_from` do not fit the model.
        """
        if folder is None or (config.resume == AUTO and not last_checkpoints(folder)):
            config, tokenizer = _with_tokenizer(config)
            if config.init_from is None:
                return cls(config, tokenizer=tokenizer)
            run = Run.load(config.init_from, model)
            if tokenizer and tokenizer.fingerprint != run.tokenizer.fingerprint:
                other = f"the tokenizer of init_from={config.init_from}"
                message = f"differs from {other}: leave this out"
                raise UserError(message, "data.tokenizer", config.data.tokenizer)
            parent_model = run.load_model()
            _check_shape(config, parent_model.config, run)
            parent = _parent(run, parent_model)
            return cls(config, parent_model=parent_model, tokenizer=run.tokenizer, parent=parent)
        assert config.resume is not None
        checkpoint = last_checkpoint(folder if config.resume == AUTO else Path(config.resume))
        run = Run(folder, checkpoint)
        values = run.config
        if missing := [name for name in _SECTIONS if name not in values]:
            raise UserError(f"{folder / CONFIG} lacks {', '.join(missing)}: restore the file")
        if (name := values.get("model_class")) is not None and model is None:
            raise ModelClassError(f"{folder} was trained with the class {name}", name)
        before = TrainConfig.from_dict(values, config_class(model or GPT))
        if config.resume == AUTO:
            _check_settings(config, before, folder)
        data = with_cache_here(before.data, config.data.cache_dir)
        content = read_checkpoint(checkpoint)
        stored, step = content["hyper_parameters"], content["global_step"]
        parent = parent_of(stored, checkpoint)  # not from the parent run, which may be deleted
        tokenizer = run.tokenizer if parent or before.data.tokenizer else None
        if parent is not None:  # an earlier version recorded more about the parent
            stored = {**stored, "init_from": dataclasses.asdict(parent)}
        config = dataclasses.replace(before, data=data)
        validates = content.get(VALIDATES) is True
        return cls(config, checkpoint, step, validates, stored, tokenizer=tokenizer, parent=parent)

    def prepared_data(self, schedule: Schedule) -> DataModule:
        """Return the data of the run. One process prepares the data; any others wait for it.

        Args:
            schedule: number of updates, and number of tokens in each update.

        Raises:
            UserError: model.vocab_size is less than the size of the tokenizer.
        """
        config, accumulate = self.config, self.config.trainer.accumulate_grad_batches
        n_batches, start_batch = schedule.n_steps * accumulate, self.step * accumulate
        length, vocab_size = config.model.context_length, config.model.vocab_size
        data = DataModule(config.data, length, n_batches, config.seed, start_batch, self.tokenizer)
        data.setup("fit")  # also prepares the data; `prepare_data` would read it again
        if (size := data.tokenizer.vocab_size) > vocab_size:
            message = f"is below the tokenizer's {size}: leave it out, it follows data.vocab_size"
            raise UserError(message, "model.vocab_size", vocab_size)
        return data

    def with_vocabulary(self, tokenizer: Tokenizer) -> ResumeState:
        """Return the state with the model's vocabulary reduced to the size of `tokenizer`.

        Only a new model is changed, and only if its `vocab_size` equals data.vocab_size, the
        maximum size of the tokenizer.
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
        extra = {"tokenizer": data.tokenizer.fingerprint, "train_tokens": data.train.n_tokens}
        if self.parent is not None:
            extra["init_from"] = dataclasses.asdict(self.parent)
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
            raise UserError(f"{message}; use its stories, devices and settings, or a new run")

    def clear(self, folder: Path) -> None:
        """Remove the temporary files of a killed process, and rename damaged checkpoints.

        Only checkpoints that are newer than `checkpoint` are checked for damage.
        """
        for pattern in ("*.tmp", f"{CHECKPOINTS}/*.tmp"):
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
        config: all settings, with `resume`.

    Raises:
        UserError: there is no such run, `name` is missing for resume=auto, or a link in the run
            folder points outside the folder.
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


def _with_tokenizer(config: TrainConfig) -> tuple[TrainConfig, Tokenizer | None]:
    """Return `config` with the vocabulary size of data.tokenizer, and the loaded tokenizer.

    Raises:
        UserError: the tokenizer is missing or damaged, or data.vocab_size differs from its size.
    """
    data, name = config.data, "data.tokenizer"
    if data.tokenizer is None:
        return config, None
    path = Path(data.tokenizer).expanduser()
    if path.suffix in (".ckpt", ".safetensors"):
        path = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
    file = path if path.suffix == ".json" else path / TOKENIZER
    if not file.is_file():
        message = f"there is no {file}; give a run folder, a checkpoint, an export or a {TOKENIZER}"
        raise UserError(message, name, data.tokenizer)
    try:
        tokenizer = Tokenizer.load(file)
    except UserError as error:
        raise UserError(error.message, name, data.tokenizer) from None
    size = tokenizer.vocab_size
    typed = any(word.startswith("data.vocab_size=") for word in config.overrides)
    if data.vocab_size not in (size, None if typed else DataConfig.vocab_size):
        message = f"{name}={data.tokenizer} has {size} tokens: leave this setting out"
        raise UserError(message, "data.vocab_size", data.vocab_size)
    model = config.model
    if model.vocab_size == data.vocab_size:
        model = dataclasses.replace(model, vocab_size=size)
    data = dataclasses.replace(data, vocab_size=size)
    return dataclasses.replace(config, data=data, model=model), tokenizer


def _check_shape(config: TrainConfig, trained: GPTConfig, run: Run) -> None:
    """Raise UserError if the model's shape differs from `trained`, the shape of the parent `run`.

    The context length may differ, because positions are computed, not learned. Dropout may differ,
    because it has no weights.
    """
    fix = {
        f"model.{name}": value
        for name, value in dataclasses.asdict(trained).items()
        if name not in ("context_length", "dropout") and getattr(config.model, name, None) != value
    }
    size = run.config.get("size")
    if fix and size not in (None, "gpt", config.size):
        fix = {"model": size}
    if fix:
        raise UserError("this run's model has another shape", "init_from", config.init_from, fix)


def _parent(run: Run, model: GPT) -> Parent:
    """Return the provenance record for a run that starts with `model`, the model of `run`."""
    summary = run.summary
    parent = parent_of(summary, run.folder / SUMMARY)

    def total(name: str) -> Any:
        own, before = summary.get(name), getattr(parent, name) if parent else 0
        return None if own is None or before is None else before + own

    try:
        entry = {
            "name": run.folder.resolve().name,
            "weights": weights_fingerprint(model),
            "tokens": total("tokens"),
            "seconds": total("seconds"),
            "sources": [*(parent.sources if parent else []), run.config["data"]["source"]],
        }
    except (KeyError, TypeError):
        message = f"{run.folder} has no record of its training"
        raise UserError(f"{message}: restore its {CONFIG} and {SUMMARY}") from None
    return build(Parent, entry, f"{run.folder}")


def run_lock(folder: Path) -> AcquireReturnProxy:
    """Lock a run, so that only one process trains the run at a time.

    Args:
        folder: the run folder.

    Returns:
        The lock, as a context manager that releases the lock at its end.

    Raises:
        UserError: another process trains the run. The lock of a killed process is released.
    """
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        message = f"{folder} is being trained by another process: wait, or choose another name"
        raise UserError(message, "name", folder.name) from None


def _check_settings(config: TrainConfig, before: TrainConfig, folder: Path) -> None:
    """Raise UserError if `config` differs from `before`, the config of the run in `folder`."""
    earlier = flat(settings_of(before))
    by_tokenizer = config.data.tokenizer is not None
    ignored = {*_MAY_CHANGE, *(["data.vocab_size"] if by_tokenizer else [])}
    size, limit = config.model.vocab_size, config.data.vocab_size
    if size == limit and (by_tokenizer or earlier["model.vocab_size"] <= size):
        ignored.add("model.vocab_size")  # it follows the tokenizer
    for name, value in flat(settings_of(config)).items():
        if name not in ignored and earlier[name] != value:
            message = f"the run in {folder} used another value; use that value or another name"
            raise UserError(message, name, value, {name: earlier[name]})
