# Two commands from a fresh clone: `make quickstart` trains and shows a model, `make test` checks all.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-export lint format clean
.DELETE_ON_ERROR:

quickstart: .venv/installed
	$(BIN)/python train.py experiment=quickstart
	$(BIN)/python evaluate.py ckpt=runs stories.n=1
	@echo "next:    $(BIN)/python train.py budget.tokens=20e6     (better stories, in minutes)"
	@echo "         $(BIN)/python train.py model=medium           (or large)"
	@echo "         $(BIN)/python train.py --help"

test: lint
	$(BIN)/python -m pytest -n auto

test-export: .venv/installed-export
	$(BIN)/python -m pytest tests/extra/test_export_tools.py

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: .venv/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/installed

.venv/installed-export: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[export,lm-eval]'
	touch $@

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build *.egg-info
