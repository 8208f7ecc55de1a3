import json

from tests.conftest import trained_folder


def test_profile_writes_a_trace_and_a_table_of_ten_steps(tiny: list[str]):
    folder = trained_folder([*tiny, "trainer.profile=true", "trainer.accumulate_grad_batches=2"])
    trace = json.loads((folder / "profile/trace.json").read_text(encoding="utf-8"))
    name = "Optimizer.step#CombinedOptimizer.step"
    steps = [e for e in trace["traceEvents"] if e.get("name") == name]
    assert len(steps) == 5  # the second half of a run of ten updates
    table = (folder / "profile/operators.txt").read_text(encoding="utf-8")
    assert "aten::" in table
    assert "Self CPU" in table


def test_run_without_profile_has_no_such_folder(tiny: list[str]):
    assert not (trained_folder([*tiny, "budget.tokens=320"]) / "profile").exists()
