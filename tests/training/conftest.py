"""Fixtures of the tests of training."""

from pathlib import Path

import pytest

from tests.conftest import trained_folder


@pytest.fixture
def parent(tiny: list[str]) -> Path:
    return trained_folder([*tiny, "name=parent"])
