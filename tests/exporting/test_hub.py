import re
from unittest.mock import create_autospec

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from minigpt.core.settings import UserError
from minigpt.exporting.hub import check_repository, push_folder
from tests.cli.test_app import run_main
from tests.conftest import naming


@pytest.fixture
def hub(monkeypatch):
    """A mock of the Hub that accepts everything."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.create_repo.return_value = "https://huggingface.co/me/tiny"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    return api


def test_dry_run_sends_nothing(run, tmp_path, hub, monkeypatch, capsys):
    words = ("export", str(run), str(tmp_path / "out"))
    assert run_main(monkeypatch, *words) == 0
    assert "config.json" in capsys.readouterr().out
    assert run_main(monkeypatch, *words, "--push", "me/tiny", "--dry-run") == 0
    output = capsys.readouterr().out
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in output
    assert re.search(naming("https://huggingface.co/me/tiny"), output)
    assert all(path.name in output for path in (tmp_path / "out").iterdir())
    assert hub.mock_calls == []


def test_push_sends_the_folder_of_the_export(run, tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run_main(monkeypatch, "export", str(run), str(out), "--push", "me/tiny") == 0
    assert "https://huggingface.co/me/tiny" in capsys.readouterr().out.splitlines()[-1]
    hub.create_repo.assert_called_once_with(
        "me/tiny", repo_type="model", exist_ok=True, private=False
    )
    arguments = hub.upload_folder.call_args.kwargs
    assert (arguments["repo_id"], arguments["folder_path"]) == ("me/tiny", out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert re.search("^# me/tiny\\b", card, re.MULTILINE)
    assert 'model="me/tiny"' in card
    words = ("--push", "me/tiny", "--private", "--format", "safetensors", "--license", "cc0-1.0")
    assert run_main(monkeypatch, "export", str(run), str(out), *words) == 0
    assert hub.create_repo.call_args.kwargs["private"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert ModelCard.load(out / "README.md").data.license == "cc0-1.0"
    assert "`cc0-1.0`" in card
    assert "hf download me/tiny --local-dir tiny\nminigpt generate tiny " in card


def test_private_push_to_a_public_repository_is_refused(tmp_path, hub):
    hub.repo_info.return_value.private = False
    with pytest.raises(UserError, match=naming("me/tiny", "public")):
        push_folder(tmp_path, "me/tiny", private=True)
    hub.upload_folder.assert_not_called()
    push_folder(tmp_path, "me/tiny")
    hub.upload_folder.assert_called_once()


def test_unreachable_hub_is_one_line(tmp_path, hub):
    hub.create_repo.side_effect = ConnectionError("no route\nto host")
    with pytest.raises(UserError, match=naming("me/tiny", "no route to host")):
        push_folder(tmp_path, "me/tiny")


@pytest.mark.parametrize("name", ["tiny", "me/ti ny", "../../x", "a/b/c"])
def test_repository_name_without_a_user_is_refused(name):
    with pytest.raises(UserError, match=naming("user/name")) as error:
        check_repository(name, dry_run=True)
    assert (error.value.argument, error.value.value) == ("push", name)


def test_push_without_a_token_is_refused(hub, monkeypatch):
    check_repository("me/tiny")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    check_repository("me/tiny", dry_run=True)
    with pytest.raises(UserError, match=naming("HF_TOKEN")):
        check_repository("me/tiny")
