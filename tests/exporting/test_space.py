from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from minigpt.core.settings import UserError
from minigpt.exporting.space import write_space
from minigpt.model import GPT
from minigpt.runs.folder import Run
from tests.cli.test_app import run_main
from tests.conftest import ROOT, naming
from tests.exporting.test_hub import hub  # noqa: F401


def test_space_has_page_model_settings_and_versions(run, tmp_path):
    out = tmp_path / "space"
    files = write_space(Run.load(run), out, "me/my-space")
    names = {path.relative_to(out).as_posix() for path in files}
    assert {"app.py", "README.md", "requirements.txt", "model/model.safetensors"} <= names
    assert {"minigpt/playground/static/playground.css", "minigpt/kernels/decode.py"} <= names
    assert not any("tinystories/" in name or "__pycache__" in name for name in names)
    front = yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (front["title"], front["sdk"], front["app_file"]) == ("my-space", "gradio", "app.py")
    assert front["sdk_version"] == metadata.version("gradio")
    versions = (out / "requirements.txt").read_text(encoding="utf-8").split()
    assert f"tokenizers=={metadata.version('tokenizers')}" in versions
    assert not any("+" in version for version in versions)
    for path in files:
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path
        assert str(ROOT).encode() not in content, path
    assert Run.load(out / "model").load_model().n_parameters
    write_space(Run.load(run), out)  # an earlier Space is replaced
    (out / "mine.txt").touch()
    with pytest.raises(UserError, match=naming("out", "mine.txt")):
        write_space(Run.load(run), out)


def test_space_with_another_model_class_is_refused(run, tmp_path):
    class Mine(GPT):
        pass

    with pytest.raises(UserError, match=naming("GPT")):
        write_space(Run.load(run, Mine), tmp_path / "space")


def test_publish_uploads_a_model_or_a_space(run, tmp_path, hub, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    words = ("publish", str(run), "me/tiny", "--space")
    assert run_main(monkeypatch, *words, "--dry-run") == 0
    assert "python tiny/app.py" in capsys.readouterr().out
    assert hub.mock_calls == []
    assert run_main(monkeypatch, *words) == 0
    create, upload = hub.create_repo.call_args.kwargs, hub.upload_folder.call_args.kwargs
    assert (create["repo_type"], create["space_sdk"]) == ("space", "gradio")
    assert (upload["repo_type"], upload["folder_path"]) == ("space", Path("tiny"))
    assert run_main(monkeypatch, "publish", str(run), "me/tiny", "--out", "hf") == 0
    assert hub.create_repo.call_args.kwargs["repo_type"] == "model"
    assert (tmp_path / "hf" / "config.json").is_file()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert run_main(monkeypatch, "publish", str(run), "me/tiny") == 2
    assert "HF_TOKEN" in capsys.readouterr().err
