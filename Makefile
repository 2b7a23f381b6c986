# One command for each thing a developer does; `make help` lists them.
# The environment in .venv is made on first use and again when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help mnist test test-slow test-docs test-stores test-loggers check format docs picture bench build clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "  %-10s %s\n", $$1, $$2}'
	@echo 'Options: ARGS="..." goes to the recipe, to pytest or to the benchmarks, PYTHON=python3.12 makes the environment, VENV=.venv says where.'

# pip of a fresh environment may be too old for --group. A venv without pip was cut short: made anew.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxtrainer needs Python 3.11 or newer, got " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	@echo 'Installing into $(VENV) (a few minutes the first time) ...'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --editable . --group dev --group tests
	@touch $@

mnist: $(STAMP) ## train the MNIST recipe
	$(BIN)/python recipes/mnist_mlp.py $(ARGS)

test: $(STAMP) ## run the quick tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(STAMP) ## run the slow tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'slow and not gpu and not stores and not loggers' $(ARGS)

test-docs: $(STAMP) ## run every program of the documentation
	$(BIN)/python -m pytest -n 2 -m 'slow or not slow' tests/test_docs.py $(ARGS)

test-stores: $(STAMP) ## run the tests of checkpoints in gs:// and s3://, with servers of their own
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group stores
	$(BIN)/python -m pytest -n 2 -m stores $(ARGS)

test-loggers: $(STAMP) ## run the tests of TensorBoard, Weights & Biases and MLflow, without a network
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group loggers
	$(BIN)/python -m pytest -n 2 -m loggers $(ARGS)

check: $(STAMP) ## lint, check format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## format, sort imports, apply safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the documentation into site/
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --clean
	@echo 'open site/index.html'

picture: $(STAMP) ## make the terminal picture of README.md anew (needs tmux)
	$(BIN)/python .ci/picture.py docs/pictures/mnist_mlp.svg 'make mnist' $(BIN)/python recipes/mnist_mlp.py

bench: $(STAMP) ## time the trainer against loops by hand (short form, under 10 minutes)
	@set -e; for script in mnist_mlp overhead models startup memory scaling callbacks loggers saving trust processes; do \
		PYTHONPATH=. $(BIN)/python benchmarks/$$script.py --short $(ARGS); \
	done

build: $(STAMP) ## build the wheel and try it away from the source tree
	rm -rf dist
	$(BIN)/python -m build --no-isolation --wheel
	.ci/try_wheel $(BIN)/python dist/*.whl

clean: ## remove the environment, builds and caches (runs/ stays)
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
