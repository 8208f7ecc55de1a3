"""Where a run begins: anew, with the weights of another, or at its last good checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minigpt.core.distributed import global_rank
from minigpt.core.files import refuse_links_out
from minigpt.core.settings import UserError, build
from minigpt.data.preparation import with_cache_here
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import is_whole, read_checkpoint, weights_fingerprint
from minigpt.runs.folder import (
    CHECKPOINTS,
    SUMMARY,
    TOKENIZER,
    Run,
    last_checkpoint,
    last_checkpoints,
    read_config,
)
from minigpt.runs.provenance import Parent, parent_of
from minigpt.runs.records import checkpoint_summary
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import Job
from minigpt.training.module import GPTModule

log = logging.getLogger("minigpt")

AUTO = "auto"  # resume=auto: the run of this name, if there is one
# Settings that say where a run and its cache lie, and not what it is.
_ASIDE = ("name", "runs_dir", "resume", "data.cache_dir")


@dataclasses.dataclass(frozen=True)
class Start:
    """A job, and the checkpoint it goes on from; without one it begins at step 0.

    With `init_from` it begins with the weights of another run, and keeps the tokenizer that gives
    its tokens their meaning.
    """

    job: Job
    checkpoint: Path | None = None
    step: int = 0
    hyper_parameters: dict[str, Any] | None = None
    net: GPT | None = None  # the other run's, for a run that begins
    tokenizer: Tokenizer | None = None  # the other run's; None: one is trained on the stories
    parent: Parent | None = None  # the other run, for the records of this one

    @classmethod
    def of(cls, job: Job, folder: Path | None) -> Start:
        """What is in `folder`, which goes on with its own settings. No folder: a new run.

        Raises:
            UserError: nothing there can be gone on from, or with resume=auto it is another job; or
                the weights of `init_from` do not fit the model.
        """
        if folder is None or (job.resume == AUTO and not last_checkpoints(folder)):
            return cls(job) if job.init_from is None else cls._with_weights_of(job, job.init_from)
        assert job.resume is not None
        before = build(Job, read_config(folder), "")
        if job.resume == AUTO:
            _check_settings(job, before, folder)
        data = with_cache_here(before.data, job.data.cache_dir)
        before = dataclasses.replace(before, data=data)
        checkpoint = last_checkpoint(folder if job.resume == AUTO else Path(job.resume))
        content = read_checkpoint(checkpoint)
        made_of, step = content["hyper_parameters"], content["global_step"]
        parent = parent_of(made_of, checkpoint)  # that run itself may be gone by now
        tokenizer = Tokenizer.load(folder / TOKENIZER) if parent else None
        if parent is not None:  # an earlier version wrote more about it
            made_of = {**made_of, "init_from": dataclasses.asdict(parent)}
        return cls(before, checkpoint, step, made_of, tokenizer=tokenizer, parent=parent)

    @classmethod
    def _with_weights_of(cls, job: Job, path: str) -> Start:
        run = Run.open(path)
        net = run.load_net()
        _check_shape(job, net.config, run)
        return cls(job, net=net, tokenizer=run.load_tokenizer(), parent=_parent(run, net))

    def set_weights(self, net: GPT) -> None:
        """Give `net` the weights that the run begins with, if they are not to be random."""
        if self.net is not None:
            net.load_state_dict(self.net.state_dict())

    def check_the_same(self, module: GPTModule) -> None:
        """UserError: the run would not go on with the steps and the stories it began with."""
        if self.hyper_parameters is None:
            return
        before = self.hyper_parameters
        changed = []
        for key, value in module.hparams.items():
            then = before.get(key)
            if isinstance(value, dict) and isinstance(then, dict):
                then = {**value, **then}  # a setting newer than the checkpoint: it had no other
            if then != value:
                changed.append(key)
        if changed:
            raise UserError(
                f"{self.checkpoint} cannot go on here, as its {', '.join(changed)} would not be "
                "the same: restore the stories and the number of devices, or train a new run"
            )

    def clear(self, folder: Path) -> None:
        """Remove what a killed process left half-written; set damaged checkpoints aside."""
        if global_rank() > 0:
            return
        for pattern in ("*.tmp", f"{CHECKPOINTS}/*.tmp"):
            for leftover in folder.glob(pattern):
                leftover.unlink()
        for path in last_checkpoints(folder):
            if path == self.checkpoint:
                break
            if not is_whole(path):  # it is not to be kept in the place of a good one
                log.warning("%s is damaged: going on from %s", path, self.checkpoint)
                path.replace(path.with_name(f"{path.name}.damaged"))


def folder_to_resume(job: Job, parent: Path) -> Path | None:
    """The run folder that `job.resume` means; None: a new run begins.

    Raises:
        UserError: there is no such run, resume=auto has no name to look for, or what training
            would write there leads elsewhere.
    """
    folder = _find(job, parent)
    if folder is not None:
        refuse_links_out(folder)
    return folder


def _find(job: Job, parent: Path) -> Path | None:
    if job.resume is None:
        return None
    if job.resume == AUTO:
        if job.name is None:
            raise UserError("resume=auto goes on with the run of that name: add name=<run>")
        return parent / job.name if (parent / job.name).is_dir() else None
    path = Path(job.resume)
    if last_checkpoints(path):
        return path
    return last_checkpoint(path).parent.parent


def _check_shape(job: Job, found: GPTConfig, run: Run) -> None:
    """UserError: the weights of `run`, of the shape `found`, do not fit the model of the job.

    The context may be another one: positions are computed, not learned.
    """
    shape = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "embedding_scale")
    other = [key for key in shape if getattr(found, key) != getattr(job.model, key)]
    if not other:
        return
    size = run.config().get("size")
    fix = {"model": size} if size not in (None, "gpt", job.size) else {}
    raise UserError(
        "its weights are of another shape than the model",
        "init_from",
        job.init_from,
        fix={**fix, **{f"model.{key}": getattr(found, key) for key in other}},
    )


def _parent(run: Run, net: GPT) -> Parent:
    """Return what a run that begins with `net`, the weights of `run`, records about them."""
    config, summary = run.config(), checkpoint_summary(run)
    before = parent_of(summary, run.folder / SUMMARY)
    sources = before.sources if before else []

    def total(name: str) -> Any:
        own, earlier = summary.get(name), getattr(before, name) if before else 0
        return None if own is None or earlier is None else earlier + own

    try:
        entry = {
            "name": run.folder.resolve().name,
            "weights": weights_fingerprint(net),
            "tokens": total("tokens"),
            "seconds": total("seconds"),
            "sources": [*sources, config["data"]["source"]],
        }
    except (KeyError, TypeError):
        raise UserError(
            f"{run.folder} does not record how it was trained: its config.yaml or summary.json is "
            "not what a run writes"
        ) from None
    return build(Parent, entry, f"{run.folder}")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep a second process from training the same run at the same time.

    Raises:
        UserError: another process does. The lock of one that was killed is gone with it.
    """
    if global_rank() > 0:  # the first process holds it for all of the run
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is being trained by another process: wait for it, or take another name=..."
        ) from None
    try:
        yield
    finally:
        lock.release()


def settings(job: Job) -> dict[str, Any]:
    """All settings as plain values, with absolute paths: to be found again from anywhere."""
    paths = {
        "train_files": tuple(str(Path(name).absolute()) for name in job.data.train_files),
        "valid_files": tuple(str(Path(name).absolute()) for name in job.data.valid_files),
        "cache_dir": str(Path(job.data.cache_dir).absolute()),
    }
    init_from = str(Path(job.init_from).absolute()) if job.init_from else None
    data = dataclasses.replace(job.data, **paths)
    job = dataclasses.replace(job, data=data, init_from=init_from)
    return _lists(dataclasses.asdict(job))


def _lists(value: Any) -> Any:
    """`value` with tuples as lists, which YAML knows."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _check_settings(job: Job, before: Job, folder: Path) -> None:
    """UserError: `job`, which is to go on with the run in `folder`, asks for another one."""
    then, now = _typed(settings(before)), _typed(settings(job))
    for name, value in now.items():
        if name not in _ASIDE and then[name] != value:
            raise UserError(
                f"not what {folder} was trained with; choose another name, or set it back",
                name,
                value,
                fix={name: then[name]},
            )


def _typed(group: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings under the dotted names that they are typed with."""
    names: dict[str, Any] = {}
    for key, value in group.items():
        inner = isinstance(value, dict)
        names |= _typed(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return names
