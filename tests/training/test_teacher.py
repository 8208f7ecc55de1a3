"""`teacher=RUN`: a student that learns from the text and from the predictions of teachers."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigpt.cli.compose import compose_values
from minigpt.core.settings import ModelClassError, UserError
from minigpt.core.text import human_count
from minigpt.data.config import DataConfig
from minigpt.evaluation import StoriesConfig
from minigpt.exporting import ExportConfig, export
from minigpt.kernels.distillation import Distillation
from minigpt.model import GPT
from minigpt.runs.checkpoint import read_checkpoint, weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.provenance import teachers_of
from minigpt.runs.records import last_values, read_metrics, read_summary
from minigpt.scaling.results import keep_run, read_run
from minigpt.scaling.tables import markdown
from minigpt.training.config import TeacherConfig
from minigpt.training.loop import train
from tests.conftest import SHORT, composed, naming, trained_folder, write_stories
from tests.training.test_inheritance import weights
from tests.training.test_loop import fail_at_step


@pytest.fixture
def teacher(tiny: list[str], trained_once: Callable[..., Path]) -> Path:
    """A wider model than the student, trained on the same stories."""
    return trained_once([*tiny, "model.d_model=24", "name=teacher"])


def divergence(student: Path, teacher: Path, tokens: torch.Tensor) -> float:
    models = [Run.load(run).load_model() for run in (student, teacher)]
    return float(Distillation(models[0], models[1:])(tokens[:, :-1], tokens[:, 1:])[2])


def test_student_comes_closer_to_its_teacher_and_logs_cross_entropy_and_divergence(
    tiny: list[str], teacher: Path
):
    tiny = [*tiny, "budget.tokens=6400"]
    alone = trained_folder([*tiny, "name=alone"])
    taught = trained_folder([*tiny, f"teacher={teacher}", "teacher.weight=0.9", "name=taught"])
    tokens = torch.randint(0, 300, (8, 17), generator=torch.Generator().manual_seed(0))
    assert divergence(taught, teacher, tokens) < 0.9 * divergence(alone, teacher, tokens)
    rows = [read_metrics(run)[0] for run in (alone, taught)]
    assert rows[0]["train/loss"] == pytest.approx(rows[1]["train/loss"], abs=1e-4)
    assert "train/divergence" not in rows[0]
    assert 0 < last_values(read_metrics(taught))["train/divergence"] < rows[1]["train/divergence"]


def test_student_takes_the_tokenizer_of_its_teacher(tiny: list[str], teacher: Path, tmp_path: Path):
    stories = write_stories(tmp_path / "other.txt", 300, 7)
    other = [word for word in tiny if "vocab_size" not in word] + SHORT
    other += [f"data.train_files=[{stories}]"]
    student = trained_folder([*other, f"teacher={teacher}", "name=student"])
    same = Run.load(teacher).tokenizer.fingerprint
    assert Run.load(student).tokenizer.fingerprint == same
    assert Run.load(student).load_model().config.vocab_size == 300
    alone = trained_folder([*other, "data.vocab_size=290", "name=alone"])
    with pytest.raises(UserError) as error:
        trained_folder([*other, f"teacher=[{teacher},{alone}]", "name=two"])
    assert all(str(run) in str(error.value) for run in (teacher, alone))
    with pytest.raises(UserError, match=str(teacher)) as error:
        trained_folder(
            [*other, f"teacher={teacher}", f"data.tokenizer={alone}", "data.vocab_size=290"]
        )
    assert error.value.argument == "data.tokenizer"
    with pytest.raises(UserError) as error:
        trained_folder([*other, f"teacher={teacher}", "data.vocab_size=290", "name=two"])
    assert error.value.argument == "data.vocab_size"


def whole_and_broken(command: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Train a run to its end, and the same run until an error after its checkpoint at step 5."""
    command = [*command, "callbacks.checkpoint_steps=5"]
    whole = trained_folder([*command, "name=whole"])
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail_at_step(6))
        with pytest.raises(RuntimeError, match="interrupted"):
            trained_folder([*command, "name=broken"])
    return whole, whole.parent / "broken"


def assert_same_end(whole: Path, resumed: Path) -> None:
    ends = weights(whole), weights(resumed)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert read_summary(resumed)["teachers"] == read_summary(whole)["teachers"]


@pytest.mark.parametrize("typed", [[], ["trainer.accumulate_grad_batches=2"]])
def test_resume_with_a_teacher_is_bit_exact(
    tiny: list[str], teacher: Path, typed: list[str], monkeypatch: pytest.MonkeyPatch
):
    whole, broken = whole_and_broken([*tiny, *typed, f"teacher={teacher}"], monkeypatch)
    moved = teacher.replace(teacher.with_name("moved"))
    with pytest.raises(UserError) as error:
        trained_folder([f"resume={broken}"])
    assert (error.value.argument, error.value.value) == ("teacher.runs", str(teacher))
    assert f"resume={broken}" in str(error.value)
    (broken / "summary.json").write_text("{")  # the resumed run replaces it
    trained_folder([f"resume={broken}", f"teacher={moved}"])
    assert_same_end(whole, broken)


def test_resume_with_another_teacher_is_refused(tiny: list[str], teacher: Path):
    tiny = [*tiny, *SHORT]
    student = trained_folder([*tiny, f"teacher={teacher}", "name=student"])
    shutil.copy(student / "checkpoints/last.ckpt", student / "checkpoints/best.ckpt")
    other = trained_folder([*tiny, f"teacher={student}", "name=other"])
    for run in (other, student):
        with pytest.raises(UserError) as error:
            trained_folder([f"resume={student}", f"teacher={run}"])
        assert error.value.argument == "teacher.runs"


def test_complete_run_does_not_need_its_teacher_again(tiny: list[str], teacher: Path):
    student = trained_folder([*tiny, *SHORT, f"teacher={teacher}", "name=student"])
    before = weights(student), read_summary(student)
    teacher.rename(teacher.with_name("moved"))
    assert trained_folder([f"resume={student}"]) == student
    assert all(torch.equal(before[0][name], value) for name, value in weights(student).items())
    assert read_summary(student) == before[1]
    with pytest.raises(UserError) as error:
        trained_folder([f"resume={student}", f"teacher={teacher}"])
    assert error.value.argument == "teacher.runs"


def test_finished_run_with_a_damaged_checkpoint_needs_its_teacher(tiny: list[str], teacher: Path):
    command = [*tiny, f"teacher={teacher}", "callbacks.checkpoint_steps=5", "name=student"]
    student = trained_folder(command)
    (student / "checkpoints/last.ckpt").write_bytes(b"damaged")
    teacher.rename(teacher.with_name("moved"))
    with pytest.raises(UserError) as error:
        trained_folder([f"resume={student}"])
    assert error.value.argument == "teacher.runs"


def test_resume_finds_the_recorded_order_of_moved_teachers(
    tiny: list[str], teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    other = trained_folder([*tiny, "seed=5", "name=other"])
    whole, broken = whole_and_broken([*tiny, f"teacher=[{teacher},{other}]"], monkeypatch)
    with pytest.raises(UserError, match=naming("teacher", "other")) as error:
        trained_folder([f"resume={broken}", f"teacher={other}"])
    assert (error.value.argument, error.value.value) == ("teacher.runs", [str(other)])
    trained_folder([f"resume={broken}", f"teacher=[{other},{teacher}]"])
    assert_same_end(whole, broken)


def test_run_and_its_export_are_one_teacher(tiny: list[str], teacher: Path, tmp_path: Path):
    export(Run.load(teacher), tmp_path / "out", ExportConfig("safetensors", dtype="bfloat16"))
    paths = [str(teacher), str(tmp_path / "out")]
    with pytest.raises(UserError) as error:
        trained_folder([*tiny, f"teacher=[{','.join(paths)}]", "name=student"])
    assert error.value.fix == {"teacher.runs": paths[:1]}


@pytest.mark.long
@pytest.mark.usefixtures("drawn_charts")
def test_report_shows_divergence_weight_and_temperature(tiny: list[str], teacher: Path):
    words = [f"teacher={teacher}", "teacher.weight=0.75", "teacher.temperature=1.25"]
    page = (trained_folder([*tiny, *words, "name=student"]) / "report.html").read_text()
    assert "Divergence" in page
    assert re.search(r"teacher\.weight.*?0\.75", page, re.DOTALL)
    assert re.search(r"teacher\.temperature.*?1\.25", page, re.DOTALL)


@pytest.mark.long
def test_summary_card_and_scaling_table_name_teachers_and_their_tokens(
    tiny: list[str], teacher: Path, tmp_path: Path
):
    other = trained_folder([*tiny, "seed=5", "name=other"])
    first = trained_folder([*tiny, f"teacher=[{teacher},{other}]", "name=first"])
    second = trained_folder([*tiny, f"teacher={first}", "name=second"])
    child = trained_folder([*tiny, f"teacher={teacher}", f"init_from={second}", "name=child"])
    summary = read_summary(child)
    model = Run.load(teacher).load_model()
    assert [record["weights"] for record in summary["teachers"]] == [weights_fingerprint(model)]
    names = {record.name for record in teachers_of(summary, child)}
    assert names == {"teacher", "other", "first"}
    assert "teacher" not in read_checkpoint(child / "checkpoints/last.ckpt")["state_dict"]

    seen = {run: Run.load(run).summary["tokens"] for run in (teacher, other, first, second, child)}
    total = seen[teacher] + seen[other] + seen[first]
    for folder in (child, keep_run(child, tmp_path / "kept")):
        run = read_run(folder)
        assert (run.tokens, run.teacher_tokens) == (seen[second] + 1280, total)
        assert "taught by teacher" in run.group  # not by the teachers of its parent
        assert "first" not in run.group
    assert read_run(teacher).teacher_tokens == 0
    assert human_count(total) in markdown([run], [])

    out = tmp_path / "out"
    export(Run.load(child), out, ExportConfig("safetensors"))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\| teachers \|.*\bteacher\b.* {total:,} .* 0\.5\b.* 1\.0\b.*\|", card)
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    taught = trained_folder([*tiny, f"teacher={out}", "name=taught"])
    assert read_run(taught).teacher_tokens == total + seen[second] + seen[child]


class Wide(GPT):
    """A class other than GPT whose logits are not hidden states times the embedding."""

    def forward(self, ids):
        return 2 * super().forward(ids)


def test_teacher_of_another_class_is_loaded_only_with_its_class(tiny: list[str]):
    tiny = [*tiny, *SHORT]
    teacher = trained_folder([*tiny, "name=teacher"], model=Wide)
    command = [*tiny, f"teacher={teacher}", "callbacks.checkpoint_steps=1"]
    with pytest.raises(ModelClassError, match="Wide") as error:
        trained_folder([*command, "name=student"])
    assert error.value.argument == "teacher"
    student = trained_folder([*command, "name=student"], teacher=Wide)
    assert math.isfinite(last_values(read_metrics(student))["train/divergence"])
    assert Run.load(student).config["teacher"]["class_path"].endswith("Wide")
    Run.load(student).load_model()  # a plain GPT
    with pytest.raises(ModelClassError, match="Wide") as error:
        trained_folder([f"resume={student}"])
    assert error.value.argument == "teacher"
    both = [*tiny, f"teacher=[{teacher},{student}]", "name=both"]
    taught = trained_folder(both, teacher=Wide)  # the class is that of the first teacher alone
    assert len(read_summary(taught)["teachers"]) == 2


@pytest.mark.parametrize(
    ("typed", "argument"),
    [
        ("teacher=nowhere", "teacher.runs"),
        ("teacher=''", "teacher.runs"),
        ("teacher.weight=1.5", "teacher.weight"),
        ("teacher.temperature=0", "teacher.temperature"),
        ("model.context_length=32", "model.context_length"),
        ("model.vocab_size=310", "model.vocab_size"),
    ],
)
def test_teacher_that_cannot_teach_is_refused(
    tiny: list[str], teacher: Path, typed: str, argument: str
):
    with pytest.raises(UserError) as error:
        trained_folder([*tiny, f"teacher={teacher}", "name=student", typed])
    assert error.value.argument == argument
    assert not (teacher.parent / "student").exists()


def test_a_teacher_is_given_once_and_its_settings_need_one(tiny: list[str], teacher: Path):
    copy = shutil.copytree(teacher, teacher.with_name("copy"))
    with pytest.raises(UserError, match=naming(str(teacher), str(copy))) as error:
        trained_folder([*tiny, f"teacher=[{teacher},{copy}]", "name=student"])
    assert error.value.argument == "teacher.runs"
    for name, value in (("weight", 0.7), ("temperature", 2.0)):
        with pytest.raises(UserError) as error:
            composed([f"teacher.{name}={value}"])
        assert (error.value.argument, error.value.value) == (f"teacher.{name}", value)
    with pytest.raises(UserError) as error:
        train(composed([*tiny, "name=student"]), teacher=Wide)
    assert error.value.argument == "teacher"
    with pytest.raises(UserError) as error:
        TeacherConfig(runs=(str(teacher),), temperature=math.inf)
    assert error.value.argument == "temperature"
    assert not (teacher.parent / "student").exists()


def test_resume_auto_names_the_teachers_again(tiny: list[str], teacher: Path):
    command = [*tiny, *SHORT, "name=student", "resume=auto"]
    trained_folder([*command, f"teacher={teacher}"])
    with pytest.raises(UserError) as error:
        trained_folder(command)
    assert error.value.fix == {"teacher.runs": [str(teacher)]}


@pytest.mark.parametrize("held_out", [False, True])
def test_a_teacher_that_has_read_the_tuning_stories_is_named_in_a_warning(
    tiny: list[str], caplog, held_out: bool
):
    tiny, tuning = [*tiny, *SHORT], "data.valid=tuning"
    teacher = trained_folder([*tiny, "name=teacher", *([tuning] if held_out else [])])
    caplog.clear()
    trained_folder([*tiny, "name=student", tuning, f"teacher={teacher}"])
    warned = [r for r in caplog.records if r.levelname == "WARNING" and str(teacher) in r.message]
    assert len(warned) == (not held_out)


def test_one_path_in_python_is_a_list_of_one():
    assert TeacherConfig(runs="a").runs == ("a",)  # type: ignore[arg-type]
    assert DataConfig("text", train_files="a.txt").train_files == ("a.txt",)  # type: ignore[arg-type]
    stories = StoriesConfig(prompts="Tom", temperatures=[0.5])  # type: ignore[arg-type]
    assert (stories.prompts, stories.temperatures) == (("Tom",), (0.5,))


def test_teacher_may_be_typed_as_one_word_or_as_a_list():
    for typed in ("teacher=a", "teacher=[a]", "teacher.runs=[a]"):
        assert composed([typed]).teacher.runs == ("a",)
    assert composed(["teacher=[a,b c/ü]"]).teacher.runs == ("a", "b c/ü")
    values, _ = compose_values("train", ["experiment=distill"])
    assert values["teacher"]["runs"] == ["releases/large"]
