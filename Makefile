# `make help` lists the targets with the comment after each one.
# Each target installs the packages that it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin
EXTRA := $(BIN)/python -m pytest --override-ini addopts="-q --strict-markers"

.PHONY: help quickstart life test lint format audit docs golden chaos bench clean
.PHONY: test-browser test-cluster test-examples test-export test-long test-memory test-surroundings
.PHONY: test-wandb test-wheel
.DELETE_ON_ERROR:

help:  # list the targets
	@awk -F ':.*  # ' '/^[a-z-]+:.*  # / { printf "  %-18s%s\n", $$1, $$2 }' Makefile

quickstart: .venv/installed  # install, train the small model for minutes, evaluate it, write a story
	$(BIN)/python train.py experiment=quickstart
	$(BIN)/python evaluate.py ckpt=runs stories.n=1
	@echo
	@echo "For comparison, the released large model (releases/large) writes:"
	@$(BIN)/minigpt generate releases/large --seed 1
	@echo
	@echo "Next:    $(BIN)/python train.py budget.tokens=20e6     # better stories, in 20 to 60 min"
	@echo "         $(BIN)/pip install -e '.[playground]' && $(BIN)/minigpt playground    # watch a model learn"
	@echo "         $(BIN)/python train.py model=medium           # or model=large"
	@echo "         $(BIN)/python train.py --help"

life: .venv/installed  # train the three sizes with snapshots, for the slider "Age": at least 2 to 5 hours
	@echo "20M tokens for each size. At the speeds in docs/performance.md, two cores need at least"
	@echo "  small   14 to  35 min    (with bfloat16 to without)"
	@echo "  medium  31 to  92 min"
	@echo "  large   58 to 170 min"
	@echo "Each run logs the time that it has left. A run that is stopped continues with make life."
	for size in small medium large; do \
	  $(BIN)/python train.py model=$$size budget.tokens=20e6 callbacks.snapshots=8 \
	    name=life-$$size resume=auto || exit; \
	done
	@echo "Next:    $(BIN)/minigpt playground runs/life-small runs/life-medium runs/life-large"

test: lint audit  # run the linters, the audit and all tests
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/installed-dev  # check style, docstrings, types and layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/installed-dev  # fix style problems that ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

audit: .venv/installed-dev  # check the installed packages for known vulnerabilities
	$(BIN)/python -m tests.audit

docs: .venv/installed-dev  # build the documentation site into site/, and test it
	$(BIN)/mkdocs build --strict
	$(EXTRA) tests/extra/test_site.py

# These targets need system packages or several minutes. .ci/run runs all except chaos and bench.

test-browser: .venv/installed-browser  # test the playground and the html export in Chromium
	@command -v chromium >/dev/null || [ "$$(id -u)" = 0 ] || \
	  { echo "error: the browser test needs Chromium: run as root, apt-get install chromium" >&2; exit 2; }
	@command -v chromium >/dev/null || \
	  { apt-get update -q && apt-get install -q -y --no-install-recommends chromium; }
	$(EXTRA) tests/extra/test_browser.py tests/extra/test_browser_training.py \
	  tests/extra/test_visitors.py tests/extra/test_html_export.py

test-cluster: .venv/installed-cluster  # test sweeps on one-node Slurm and a local Ray cluster
	@for tool in munged srun sbatch slurmctld slurmd; do command -v $$tool >/dev/null || missing=1; done; \
	[ -z "$$missing" ] && exit; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge; \
	else \
	  echo "error: these need root, munged, slurmctld, slurmd: apt-get install slurm-wlm munge" >&2; \
	  exit 2; \
	fi
	$(EXTRA) tests/extra/test_cluster.py tests/extra/test_preemption.py

test-export: .venv/installed-tools  # test exported models in the programs that they are for
	$(EXTRA) tests/extra/test_export_tools.py tests/extra/test_transformer_lens.py

test-wandb: .venv/installed-dev  # test logging and sweeps with a mock W&B server
	$(EXTRA) tests/extra/test_wandb.py
	$(EXTRA) -m wandb tests/training/test_checkpointing.py

test-examples: .venv/installed-dev  # run the notebooks in examples/ with tiny budgets
	$(EXTRA) tests/extra/test_examples.py

test-wheel: .venv/installed-dev  # test the wheel and the sdist, installed without a checkout
	$(EXTRA) tests/extra/test_wheel.py

test-long: .venv/installed-dev  # test what takes too long for make test
	$(EXTRA) -m long tests

test-memory: .venv/installed-dev  # test that memory does not grow with the text: a minute
	$(EXTRA) tests/extra/test_memory.py

test-surroundings: .venv/installed-dev  # test terminals, signals, shells, users and folders, as root
	@command -v zsh >/dev/null || [ "$$(id -u)" = 0 ] || \
	  { echo "error: these tests need zsh: run as root, apt-get install zsh" >&2; exit 2; }
	@command -v zsh >/dev/null || \
	  { apt-get update -q && apt-get install -q -y --no-install-recommends zsh; }
	$(EXTRA) tests/extra/test_surroundings.py tests/extra/test_shells.py tests/extra/test_environment.py \
	  tests/extra/test_commands.py

golden: .venv/installed-dev  # compare logits, curves, stories and settings with recorded ones
	$(BIN)/python -m tests.golden

chaos: .venv/installed-dev  # kill a run fifty times and fuzz its files (ten minutes)
	$(EXTRA) tests/extra/test_fuzz.py tests/extra/test_chaos.py

bench: .venv/installed-browser  # measure speed and memory, on an idle machine
	$(BIN)/python benchmarks/training.py --sweep --out docs/results/benchmarks
	$(BIN)/python benchmarks/training.py --teacher --out docs/results/benchmarks
	$(BIN)/python benchmarks/runs.py --out docs/results/benchmarks
	$(BIN)/python benchmarks/preparation.py --rounds 3 --out docs/results/benchmarks
	$(BIN)/python benchmarks/generation.py --rounds 5 --out docs/results/benchmarks
	$(BIN)/python benchmarks/playground.py --out docs/results/benchmarks

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: type make PYTHON=python3.12 quickstart")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,$*]'
	touch $@ .venv/installed .venv/installed-dev

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/installed

clean:  # remove .venv, caches and build output, but keep runs/ and the page's training runs
	find .cache -mindepth 1 -maxdepth 1 ! -name playground -exec rm -rf {} + 2>/dev/null || true
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info
