# Two commands from a fresh clone: `make quickstart` trains and shows a model, `make test` checks all.
PYTHON ?= python3
BIN := .venv/bin
EXTRA := $(BIN)/python -m pytest --override-ini addopts="-q --strict-markers"

.PHONY: quickstart test test-browser test-cluster test-export test-wandb golden chaos bench lint audit format clean
.DELETE_ON_ERROR:

quickstart: .venv/installed
	$(BIN)/python train.py experiment=quickstart
	$(BIN)/python evaluate.py ckpt=runs stories.n=1
	@echo
	@echo "And this is what the released large one writes (releases/large):"
	@$(BIN)/minigpt generate releases/large --seed 1
	@echo
	@echo "next:    $(BIN)/python train.py budget.tokens=20e6     (better stories: 20 to 60 min)"
	@echo "         $(BIN)/python train.py model=medium           (or large)"
	@echo "         $(BIN)/python train.py --help"

test: lint audit
	$(BIN)/python -m pytest -n auto --dist worksteal

# ---- what needs more than Python packages, or minutes; .ci/run runs all but chaos and bench

test-browser: .venv/installed-browser  # the playground in Chromium
	@command -v chromium >/dev/null || [ "$$(id -u)" = 0 ] || \
	  { echo "error: the browser test needs Chromium: run as root, apt-get install chromium" >&2; exit 2; }
	@command -v chromium >/dev/null || \
	  { apt-get update -q && apt-get install -q -y --no-install-recommends chromium; }
	$(EXTRA) tests/extra/test_browser.py tests/extra/test_visitors.py

test-cluster: .venv/installed-cluster  # sweeps on a Slurm of one node and on a local Ray
	@for tool in munged srun sbatch slurmctld slurmd; do command -v $$tool >/dev/null || missing=1; done; \
	[ -z "$$missing" ] && exit; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge; \
	else \
	  echo "error: these need root, munged, slurmctld, slurmd: apt-get install slurm-wlm munge" >&2; \
	  exit 2; \
	fi
	$(EXTRA) tests/extra/test_cluster.py tests/extra/test_preemption.py

test-export: .venv/installed-tools  # exported models in other people's tools
	$(EXTRA) tests/extra/test_export_tools.py

test-wandb: .venv/installed-dev  # W&B's programs, with a stand-in of its server
	$(EXTRA) tests/extra/test_wandb.py

golden: .venv/installed-dev  # logits, curves, stories and settings against those of commit c2cfd24
	$(BIN)/python -m tests.golden

chaos: .venv/installed-dev  # a run that is killed fifty times, files that are fuzzed: ten minutes
	$(EXTRA) tests/extra/test_fuzz.py tests/extra/test_chaos.py

bench: .venv/installed-dev  # the numbers of docs/performance.md and docs/generation.md, run on an idle machine
	$(BIN)/python benchmarks/training.py --sweep --out docs/results/benchmarks
	$(BIN)/python benchmarks/runs.py --out docs/results/benchmarks
	$(BIN)/python benchmarks/preparation.py --megabytes 40 400 --out docs/results/benchmarks
	$(BIN)/python benchmarks/generation.py --rounds 5 --out docs/results/benchmarks

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

audit: .venv/installed-dev  # known vulnerabilities in what is installed
	$(BIN)/python -m tests.audit

format: .venv/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

test-examples: .venv/installed-dev  # run the notebooks of examples/ on tiny budgets
	$(EXTRA) tests/extra/test_examples.py
.PHONY: test-examples

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,$*]'
	touch $@ .venv/installed .venv/installed-dev

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/installed

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build *.egg-info
