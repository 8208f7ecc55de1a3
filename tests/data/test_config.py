import pytest

from minigpt.core.settings import UserError, build
from minigpt.data.config import DataConfig
from tests.conftest import naming


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"source": "text"}, ["source", "text", "data.train_files"]),
        ({"train_files": ["a.txt"]}, ["data.train_files", "data.source", "text"]),
        ({"valid_files": ["a.txt"]}, ["data.valid_files", "data.source", "text"]),
        ({"source": "hf"}, ["data.dataset", "data.source"]),
        ({"dataset": "owner/name"}, ["data.dataset", "data.source", "hf"]),
        ({"field": "body"}, ["data.field", "body"]),
        ({"cache_dir": "~nobody-of-that-name/x"}, ["data.cache_dir", "~nobody-of-that-name/x"]),
        ({"holdout": 1.0}, ["data.holdout", "1.0"]),
        ({"holdout": 0}, ["data.holdout", "0.0"]),
        ({"holdout": -0.1}, ["data.holdout", "-0.1"]),
        ({"separator": ""}, ["data.separator"]),
        ({"download_tokens": 0}, ["data.download_tokens", "0"]),
        ({"noise": 1.1}, ["data.noise", "1.1"]),
        ({"noise": -0.1}, ["data.noise", "-0.1"]),
        ({"noise": float("nan")}, ["data.noise", "nan"]),
        ({"max_stories": 0}, ["data.max_stories", "0"]),
        ({"vocab_size": 70_000}, ["70000", "65536", "data.vocab_size"]),
        ({"batch_size": 0}, ["data.batch_size", "0"]),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(values, names):
    with pytest.raises(UserError, match=naming(*names)) as error:
        build(DataConfig, values, "data")
    assert "\n" not in str(error.value)


def test_a_holdout_of_nan_is_refused():
    with pytest.raises(UserError, match=naming("holdout", "nan")):
        DataConfig(holdout=float("nan"))


def test_home_folders_are_expanded_in_each_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/tim")
    paths = {"train_files": ("~/a.txt", "b~.txt"), "valid_files": ("~/c [d]/*.txt",)}
    config = DataConfig("text", **paths, cache_dir="~")
    assert config.train_files == ("/home/tim/a.txt", "b~.txt")
    assert config.valid_files == ("/home/tim/c [d]/*.txt",)
    assert config.cache_dir == "/home/tim"
    assert DataConfig("hf", dataset="~/data").dataset == "/home/tim/data"


def test_list_of_files_becomes_a_tuple(monkeypatch):
    monkeypatch.setenv("HOME", "/home/tim")
    config = DataConfig("text", train_files=["~/a.txt", "b.txt"])
    assert config.train_files == ("/home/tim/a.txt", "b.txt")
