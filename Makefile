# Two commands from a fresh clone: `make quickstart` trains and shows a model, `make test` checks all.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-cluster chaos lint format clean
.DELETE_ON_ERROR:

quickstart: .venv/installed
	$(BIN)/python train.py experiment=quickstart
	$(BIN)/python evaluate.py ckpt=runs stories.n=1
	@echo "next:    $(BIN)/python train.py budget.tokens=20e6     (better stories, in minutes)"
	@echo "         $(BIN)/python train.py model=medium           (or large)"
	@echo "         $(BIN)/python train.py --help"

test: lint
	$(BIN)/python -m pytest -n auto

# Sweeps on a Slurm of one node and on a local Ray, both started and ended by the tests.
test-cluster: .venv/installed-cluster
	@command -v munged srun slurmctld slurmd >/dev/null && exit; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge; \
	else \
		echo "test-cluster needs root, munged, slurmctld and slurmd: apt-get install slurm-wlm munge"; \
		exit 2; \
	fi
	$(BIN)/python -m pytest tests/extra/test_cluster.py

chaos: .venv/installed-dev  # a run that is killed fifty times: minutes
	$(BIN)/python -m pytest tests/extra/test_chaos.py

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

.venv/installed-cluster: pyproject.toml .venv/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[slurm,ray]'
	touch $@

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build *.egg-info
