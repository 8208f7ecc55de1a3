"""Which run a command resumes, its lock, and the settings that may be typed with `resume`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from minigpt.core.console import log
from minigpt.core.files import refuse_links_out
from minigpt.core.settings import UserError, flat
from minigpt.core.typed import typed_settings
from minigpt.runs.folder import last_checkpoint, last_checkpoints, read_config
from minigpt.runs.records import read_summary
from minigpt.training.config import TrainConfig, settings_of

AUTO = "auto"  # resume=auto continues the run called config.name, if there is one
# Settings that may change when a run is resumed, such as the folder of the run.
_MAY_CHANGE = (
    "name", "runs_dir", "resume", "data.cache_dir", "teacher.runs", "teacher.class_path",
    "model_class", "overrides",
)  # fmt: skip

# Settings that may be typed together with resume=<run>; the teachers may have been moved.
_KEPT = ("resume=", "data.cache_dir=", "teacher=", "teacher.runs=")
_KEPT += ("model.class_path=", "teacher.class_path=")


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


def check_settings(config: TrainConfig, before: TrainConfig, folder: Path) -> None:
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


def warn_of_ignored_settings(config: TrainConfig, before: TrainConfig, folder: Path) -> None:
    """Log a warning if `config` has settings that the run in `folder` does not take over.

    Args:
        config: settings to resume the run with. Those that are defaults count as not set.
        before: settings of the run, which it keeps.
        folder: the run folder.
    """
    values, own, defaults = (flat(settings_of(c)) for c in (config, before, TrainConfig()))
    ignored = {
        name: value
        for name, value in values.items()
        if name not in {*_MAY_CHANGE, "size"}
        and value not in (own.get(name, value), defaults.get(name, value))
    }
    if ignored:
        words = ", ".join(typed_settings(ignored))
        log.warning("the run in %s keeps its own settings and ignores %s", folder, words)


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


def _is_default(values: dict[str, Any]) -> bool:
    """Return whether the settings in a config.yaml that affect the weights are all defaults."""
    defaults = settings_of(TrainConfig())
    cache = {"cache_dir": None}
    return all(
        {**values[name], **cache} == {**defaults[name], **cache}
        for name in ("model", "data", "optimizer", "trainer")
    )
