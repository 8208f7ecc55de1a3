import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import get_type_hints
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from minigpt.cli import app
from minigpt.core.settings import UserError, build
from minigpt.data.sources import bundled_sample
from minigpt.evaluation import EvaluationConfig, StoriesConfig, evaluate
from minigpt.exporting import formats
from minigpt.exporting.card import training_commands, training_words
from minigpt.exporting.export import ExportConfig, export
from minigpt.exporting.hub import push
from minigpt.generation.sampling import SamplingConfig, generate_stories
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.records import read_summary
from minigpt.scaling.results import find_runs, read_run
from minigpt.training.config import Job
from tests.cli.test_app import run_main
from tests.conftest import ROOT, composed, naming, tiny_overrides, trained_folder

PROMPT = "Once upon a time, Tom"
QUICK = EvaluationConfig(stories=StoriesConfig(prompts=(), temperatures=(0.5,)), words=())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A trained run, whose embedding scale is no power of two."""
    tiny = tiny_overrides(tmp_path_factory.mktemp("trained"))
    return trained_folder([*tiny, "model.d_model=12", "model.dropout=0.1", "name=tiny"])


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return shutil.copytree(trained, tmp_path / "runs" / "tiny")


def made(run: Path, out: Path, **settings: str) -> Path:
    export(Run.open(run), out, build(ExportConfig, settings, ""))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def no_path_in(out: Path) -> None:
    """Nothing in the folder tells where on this machine the run or its stories lie."""
    own = yaml.safe_load((out / "../runs/tiny/config.yaml").read_text())
    for path in (
        out.parent,
        Path(own["data"]["cache_dir"]).parent,
        Path(app.__file__).parent.parent,
    ):
        for name, content in contents(out).items():
            assert os.fsencode(path) not in content, name


# ---------------------------------------------------------------------------- Hugging Face


def test_transformers_loads_an_export_and_computes_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    out = made(run, tmp_path / "out")
    net, tokenizer = Run.open(run).load_net(), Run.open(run).load_tokenizer()
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, net(ids), rtol=0, atol=1e-4)
    assert theirs.num_parameters() == net.n_parameters + net.positions.numel()
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == tokenizer.end_of_text
    assert theirs.generation_config.temperature == SamplingConfig().temperature

    words = AutoTokenizer.from_pretrained(out)
    assert words.eos_token == words.bos_token == "<|endoftext|>"
    tell = pipeline("text-generation", model=theirs, tokenizer=words)
    (told,) = tell(PROMPT, do_sample=False)
    greedy = SamplingConfig(temperature=0, max_tokens=16 - 1 - len(tokenizer.encode(PROMPT)))
    assert greedy.max_tokens >= 3
    ours = generate_stories(net, tokenizer, PROMPT, 1, greedy)[0]
    assert told["generated_text"] == PROMPT + ours


def test_the_tokenizer_of_an_export_cuts_as_ours(run, tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(made(run, tmp_path / "out"), model_max_length=10**6)
    ours = Run.open(run).load_tokenizer()
    stories = list(islice(bundled_sample().stories("valid"), 50))
    odd = ["", " ", "  naïve 😀☃ 你好\n\n\ttab  end ", "don't\r\n\u2028I'LL", "e\u0301 \x00"]
    for text in stories + odd:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [0, *ids]  # as `minigpt generate` does
        assert theirs.decode(ids) == text
    spelled = "The <|endoftext|>"
    assert 0 in theirs.encode(spelled, add_special_tokens=False)  # their way
    assert theirs.encode(
        spelled, add_special_tokens=False, split_special_tokens=True
    ) == ours.encode(spelled)


# ---------------------------------------------------------------------------- our own format


def test_an_export_in_our_format_is_a_run_without_paths(run, tmp_path, monkeypatch, capsys):
    out = made(run, tmp_path / "release", format="safetensors")
    opened, net = Run.open(out), Run.open(run).load_net()
    weights = opened.load_net().state_dict()
    for name, weight in net.state_dict().items():
        assert torch.equal(weights[name], weight.bfloat16().float())
    assert opened.load_tokenizer().fingerprint == Run.open(run).load_tokenizer().fingerprint
    assert Run.open(out / "model.safetensors") == opened
    assert read_run(*find_runs([out])).tokens == 1280
    assert run_main(monkeypatch, "generate", str(out), "--max-tokens", "3") == 0
    assert "Once upon a time" in capsys.readouterr().out
    no_path_in(out)
    again = made(out, tmp_path / "again", format="safetensors")  # from the export itself
    assert contents(again)["model.safetensors"] == contents(out)["model.safetensors"]


def test_an_export_counts_the_tokens_that_its_checkpoint_has_seen(run, tmp_path):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["global_step"] = 10
    torch.save(content, run / "checkpoints" / "best.ckpt")
    out = made(run, tmp_path / "out", format="safetensors")
    assert read_run(out).tokens == 640
    card = (out / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| [^|]*\btokens\b[^|]* \| 640 \|", card)


def test_an_export_of_own_stories_is_evaluated_on_stories_that_are_given(
    run, trained, tmp_path, monkeypatch
):
    out = made(run, tmp_path / "out", format="safetensors", dtype="float32")
    with pytest.raises(UserError, match=naming(str(out), "data=text", "data.valid_files")):
        evaluate(Run.open(out), QUICK)
    before = evaluate(Run.open(run), QUICK)
    data = {"source": "text", "valid_files": [str(trained.parents[1] / "valid.txt")]}
    data["cache_dir"] = str(tmp_path / "cache")
    given = build(EvaluationConfig, {"data": data, "stories": {"prompts": []}, "words": []}, "")
    before_it = contents(out)
    monkeypatch.chdir(tmp_path)
    after = evaluate(Run.open(out), given)
    assert contents(out) == before_it  # it may be part of a repository
    assert (tmp_path / "evaluation-text.json").is_file()
    evaluate(Run.open(out), given, out=tmp_path / "new")
    assert (tmp_path / "new" / "evaluation-text.json").is_file()
    assert (after.perplexity, after.weights) == (before.perplexity, before.weights)


def test_tinystories_are_found_by_name(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"source": "tinystories_sample", "train_files": [], "valid_files": []}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = made(run, tmp_path / "out", format="safetensors")
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert kept["data"]["source"] == "tinystories_sample"
    assert "cache_dir" not in kept["data"]
    assert {"model", "optimizer", "trainer", "budget", "seed", "size"} <= kept.keys()


def test_a_damaged_export_is_refused_in_one_line(run, tmp_path):
    out = made(run, tmp_path / "out", format="safetensors")
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"Once upon a time"):
        weights.write_bytes(part)
        with pytest.raises(UserError, match=naming("model.safetensors")):
            Run.open(out).load_net()
    hf = made(run, tmp_path / "hf")
    with pytest.raises(UserError, match=naming("config.yaml")):
        Run.open(hf).load_net()


# ---------------------------------------------------------------------------- numbers


def test_numbers_are_given_only_for_the_weights_they_were_measured_on(run, tmp_path):
    own = evaluate(Run.open(run), QUICK)
    exact = made(run, tmp_path / "exact", format="safetensors", dtype="float32")
    assert f"**{own.perplexity:.3f}**" in (exact / "README.md").read_text(encoding="utf-8")
    assert json.loads((exact / "evaluation.json").read_text())["weights"] == own.weights
    assert read_run(exact).perplexity == own.perplexity

    rounded = made(run, tmp_path / "rounded", format="safetensors")
    card = (rounded / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| validation perplexity \| [^|0-9]+ \|", card)
    assert not (rounded / "evaluation.json").exists()
    assert read_run(rounded).perplexity is None


def test_evaluate_measures_the_rounded_weights(run, tmp_path):
    out = tmp_path / "out"
    export(Run.open(run), out, ExportConfig("safetensors", evaluate=True))
    measured = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert measured["weights"] == weights_fingerprint(Run.open(out).load_net())
    assert measured["weights"] != weights_fingerprint(Run.open(run).load_net())
    assert f"**{measured['perplexity']:.3f}**" in (out / "README.md").read_text(encoding="utf-8")
    assert not (run / "evaluation.json").exists()
    no_path_in(out)
    hf = made(out, tmp_path / "hf")  # float32 holds the rounded weights exactly
    assert f"**{measured['perplexity']:.3f}**" in (hf / "README.md").read_text(encoding="utf-8")


def test_the_command_in_the_model_card_composes_to_the_settings_of_the_run(run, tmp_path):
    config, summary = Run.open(run).config, read_summary(run)
    words = shlex.split(training_commands(config, summary, None).replace("\\\n", ""))
    assert words[:2] == ["python", "train.py"]
    settings = OmegaConf.to_container(composed(words[2:]), resolve=True)
    assert isinstance(settings, dict)
    job = build(Job, {**settings, "size": "small"}, "")
    asked = build(Job, config, "")
    assert (job.model, job.optimizer, job.budget) == (asked.model, asked.optimizer, asked.budget)
    assert job.seed == asked.seed
    found = {"precision": summary["precision"], "devices": "1"}
    assert job.trainer == replace(asked.trainer, **found, accelerator="auto", log_every_n_steps=10)
    assert job.data.batch_size == asked.data.batch_size
    assert job.data.separator == asked.data.separator


def test_an_evaluation_that_lacks_a_number_is_named(run, tmp_path):
    evaluate(Run.open(run), QUICK)
    measured = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for broken, name in (
        (measured | {"precision": "32\n# Heading"}, "precision"),
        ({"weights": measured["weights"]}, "nats_per_token"),
    ):
        (run / "evaluation.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=naming("evaluation.json", name)):
            made(run, tmp_path / "out")
    (run / "evaluation.json").write_text("[" * 200_000)  # not measured, then
    made(run, tmp_path / "out")


def test_what_a_run_says_stays_in_its_cell_and_its_command_on_its_lines(run, tmp_path):
    config, summary = Run.open(run).config, read_summary(run) | {"device": "cpu | gpu"}
    (run / "summary.json").write_text(json.dumps(summary))
    config["data"]["separator"] = "\n```\n# It's a \\heading\n\u2028"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    card = (made(run, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert " on cpu \\| gpu |" in card
    (command,) = re.findall(r"```sh\n(python train.*?)\n```", card, re.DOTALL)
    assert all(line.startswith(("python ", "  ")) for line in command.splitlines())
    typed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"],
        capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    words = typed.stdout.decode().split("\0")[:-1]
    assert words == training_words(Run.open(run).config, summary)


def test_the_lines_for_lm_eval_write_what_evaluate_py_scores(run, tmp_path, monkeypatch, capsys):
    guide = (ROOT / "docs/sharing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import json.*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("runs/<name>", str(run)), {})
    first = int(capsys.readouterr().out.removeprefix("ID: "))
    tokenizer = Run.open(run).load_tokenizer()
    (line,) = (tmp_path / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    text = tokenizer.decode([first]) + json.loads(line)["text"]
    assert text.split("<|endoftext|>")[:-1] == list(bundled_sample().stories("valid"))


# ---------------------------------------------------------------------------- the folder


def test_a_model_is_not_replaced_by_its_own_export_to_another_format(run, tmp_path):
    out = made(run, tmp_path / "out", format="safetensors")
    before = contents(out)
    with pytest.raises(UserError, match=naming(str(out), "--format hf")):
        made(out, out)
    assert contents(out) == before
    made(out, out, format="safetensors")  # its card anew
    assert contents(out)["model.safetensors"] == before["model.safetensors"]


def test_an_earlier_export_is_replaced_and_nothing_else_is(run, tmp_path):
    out = made(run, tmp_path / "out")
    before = contents(out)
    made(run, out, format="safetensors")
    assert "config.json" in before
    assert not (out / "config.json").exists()  # of the format before
    (out / "evaluation-stride8.json").write_text("{}")  # as evaluate.py leaves it
    made(run, out)
    assert contents(out) == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=naming(str(out), "notes.txt")):
        made(run, out)
    assert contents(out) == {**before, "notes.txt": b"mine"}
    with pytest.raises(UserError, match=rf"{re.escape(str(run))}\D*\d"):
        made(run, run)
    with pytest.raises(UserError, match=naming(str(out / "notes.txt"))):
        made(run, out / "notes.txt")


def test_an_export_that_fails_leaves_the_earlier_one_and_no_other_trace(run, tmp_path, monkeypatch):
    out = made(run, tmp_path / "out")
    before, around = contents(out), sorted(tmp_path.iterdir())

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(formats, "_hf_config", full)
    with pytest.raises(UserError, match=naming(str(out), os.strerror(errno.ENOSPC))):
        made(run, out)
    assert contents(out) == before
    assert sorted(tmp_path.iterdir()) == around


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("goes_back", [True, False])
def test_the_earlier_export_outlives_a_swap_that_stops_half_way(
    stopped, goes_back, run, tmp_path, monkeypatch
):
    out = made(run, tmp_path / "out")
    before, around = contents(out), sorted(tmp_path.iterdir())
    rename = Path.rename

    def half(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise stopped
        if path.suffix == ".old" and not goes_back:
            raise OSError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", half)
    with pytest.raises((KeyboardInterrupt, UserError, OSError)):
        made(run, out)
    if goes_back:
        assert sorted(tmp_path.iterdir()) == around
    (kept,) = set(tmp_path.iterdir()) - {tmp_path / "runs"}
    assert contents(kept) == before


def test_the_current_folder_is_not_replaced(run, tmp_path, monkeypatch):
    out = made(run, tmp_path / "out")
    (tmp_path / "new").mkdir()
    for here, typed in ((out, "."), (tmp_path / "new", "."), (out, out)):
        monkeypatch.chdir(here)
        with pytest.raises(UserError, match=naming(str(here.resolve()), "cd ..")):
            made(run, Path(typed))
    (tmp_path / "new" / "inside").mkdir()
    (tmp_path / "new" / "export.json").write_text('{"files": ["export.json", "inside"]}')
    monkeypatch.chdir(tmp_path / "new" / "inside")
    with pytest.raises(UserError, match=naming(str((tmp_path / "new").resolve()))):
        made(run, Path(".."))


@pytest.mark.parametrize(("format", "module"), [("onnx", "onnx"), ("gguf", "gguf")])
def test_a_missing_package_is_named_with_the_command(format, module, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=naming(module, "pip install -e '.[export]'")):
        made(run, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- the verb, the Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub that takes everything and sends nothing."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.create_repo.return_value = "https://huggingface.co/me/tiny"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    return api


def test_nothing_is_sent_unless_push_is_typed(run, tmp_path, hub, monkeypatch, capsys):
    words = ("export", str(run), str(tmp_path / "out"))
    assert run_main(monkeypatch, *words) == 0
    assert "config.json" in capsys.readouterr().out
    assert run_main(monkeypatch, *words, "--push", "me/tiny", "--dry-run") == 0
    shown = capsys.readouterr().out
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in shown
    assert re.search(naming("7", "https://huggingface.co/me/tiny"), shown)
    assert hub.mock_calls == []


def test_push_sends_the_files_of_the_export(run, tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run_main(monkeypatch, "export", str(run), str(out), "--push", "me/tiny") == 0
    assert "https://huggingface.co/me/tiny" in capsys.readouterr().out.splitlines()[-1]
    hub.create_repo.assert_called_once_with(
        "me/tiny", repo_type="model", exist_ok=True, private=False
    )
    sent = hub.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["folder_path"]) == ("me/tiny", out)
    assert sorted(sent["allow_patterns"]) == sorted(path.name for path in out.iterdir())
    card = (out / "README.md").read_text(encoding="utf-8")
    assert re.search("^# me/tiny\\b", card, re.MULTILINE)
    assert 'model="me/tiny"' in card
    words = ("--push", "me/tiny", "--private", "--format", "safetensors", "--license", "cc0-1.0")
    assert run_main(monkeypatch, "export", str(run), str(out), *words) == 0
    assert hub.create_repo.call_args.kwargs["private"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: cc0-1.0\n")
    assert "`cc0-1.0`" in card
    assert "hf download me/tiny --local-dir tiny\nminigpt generate tiny --prompt" in card


def test_nothing_private_is_sent_to_a_repository_that_is_public(tmp_path, hub):
    hub.model_info.return_value.private = False
    with pytest.raises(UserError, match=naming("me/tiny", "--private")):
        push(tmp_path, "me/tiny", [], private=True)
    hub.upload_folder.assert_not_called()
    push(tmp_path, "me/tiny", [])
    hub.upload_folder.assert_called_once()


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, hub):
    hub.create_repo.side_effect = ConnectionError("no route\nto host")
    with pytest.raises(UserError, match=naming("me/tiny", "no route to host")):
        push(tmp_path, "me/tiny", [])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--push", "me/tiny"), "HF_TOKEN"),
        (("--push", "tiny"), "--push tiny"),
        (("--push", "me/ti ny"), "--push me/ti ny"),
        (("--dry-run",), "--push"),
        (("--private",), "--push"),
        (("--license", "all mine"), "--license all mine"),
        (("--dtype", "bfloat16"), "--dtype"),
        (("--format", "pt"), "--format"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    words, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    out = tmp_path / "out"
    assert run_main(monkeypatch, "export", "no-run", str(out), *words) == 2
    assert expected in capsys.readouterr().err
    assert not out.exists()


def test_the_verb_offers_what_the_library_does():
    offered = get_type_hints(ExportConfig)
    assert offered["format"] == app.Format
    assert offered["dtype"] == app.Dtype | None
