"""Teachers: models whose predictions a student learns from, in addition to the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt.core.settings import ModelClassError, UserError
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import rounded_fingerprint
from minigpt.runs.folder import ModelFactory, Run, load_one, with_factory
from minigpt.runs.provenance import Parent, own_teachers
from minigpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Teachers:
    """The loaded teachers of a run; all of them have the same tokenizer."""

    models: Sequence[GPT]
    """The models, frozen and in evaluation mode; they are loaded on the CPU."""

    tokenizer: Tokenizer
    """Tokenizer of all teachers."""

    records: Sequence[Parent]
    """Provenance record of each teacher."""

    runs: Sequence[Run]
    """The runs of the teachers."""

    @classmethod
    def load(
        cls, paths: Sequence[str], student: Path | None = None, model: ModelFactory | None = None
    ) -> Teachers:
        """Load the teachers, and check that they have the same tokenizer.

        Args:
            paths: run folders, checkpoints or exports, at least one.
            student: folder of the run in training; None if it is not known yet.
            model: class of the teachers that were trained with a custom class, or of all teachers
                if there are none; or function that creates them. None means `GPT`.

        Raises:
            UserError: a path is not a run or is the student itself, two teachers have the same
                weights, or the tokenizers differ.
            ModelClassError: a teacher was trained with another class than `model`.
        """
        runs = with_factory([_run(path, student) for path in paths], model)
        for path, run in zip(paths[1:], runs[1:], strict=True):
            if run.tokenizer.fingerprint != runs[0].tokenizer.fingerprint:
                message = f"{paths[0]} and {path} have different tokenizers: choose one of them"
                raise UserError(message, "teacher.runs", list(paths), {"teacher.runs": [paths[0]]})
        try:
            models = [run.load_model() for run in runs]
        except ModelClassError as error:
            raise ModelClassError(error.message, error.class_name, "teacher") from None
        records = [run.provenance(model) for run, model in zip(runs, models, strict=True)]
        weights = [rounded_fingerprint(model) for model in models]  # equal for a run and its export
        for i, path in enumerate(paths):
            if weights[i] in weights[:i]:
                first = paths[weights.index(weights[i])]
                problem = f"{first} and {path} have the same weights: give each teacher once"
                once = [p for j, p in enumerate(paths) if weights[j] not in weights[:j]]
                raise UserError(problem, "teacher.runs", list(paths), {"teacher.runs": once})
        return cls(models, runs[0].tokenizer, records, runs)

    def recorded_in(
        self, hyper_parameters: Mapping[str, Any], checkpoint: Path, paths: Sequence[str]
    ) -> Teachers:
        """Return these teachers as the student's checkpoint records them.

        They are in the order of the checkpoint, and have its provenance records.

        Args:
            hyper_parameters: hyper-parameters in the checkpoint.
            checkpoint: path of the checkpoint.
            paths: paths of these teachers, for the error.

        Raises:
            UserError: the student was taught by teachers with other weights.
        """
        records = own_teachers(hyper_parameters, checkpoint)
        weights = [record.weights for record in self.records]
        if sorted(weights) != sorted(record.weights for record in records):
            names = ", ".join(record.name for record in records)
            message = f"{checkpoint} was trained with other teachers: give all of them, {names}"
            raise UserError(message, "teacher.runs", list(paths))
        order = [weights.index(record.weights) for record in records]
        models, runs = [self.models[i] for i in order], [self.runs[i] for i in order]
        return replace(self, models=models, runs=runs, records=records)

    def check_shape(self, student: GPTConfig) -> None:
        """Raise UserError if a student with the config `student` cannot learn from the teachers."""
        for model, record in zip(self.models, self.records, strict=True):
            if (size := model.config.vocab_size) != student.vocab_size:
                message = f"the teacher {record.name} has a vocabulary of {size} tokens"
                fix = {"model.vocab_size": size}
                raise UserError(message, "model.vocab_size", student.vocab_size, fix)
            if (length := model.config.context_length) < student.context_length:
                message = f"the teacher {record.name} reads at most {length} tokens"
                fix = {"model.context_length": length}
                raise UserError(message, "model.context_length", student.context_length, fix)


def _run(path: str, student: Path | None) -> Run:
    run = load_one(path, "teacher.runs")
    if student is not None and run.folder.resolve() == student.resolve():
        raise UserError("a run cannot be its own teacher: choose another", "teacher.runs", path)
    return run
