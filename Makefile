# Everyday commands. Each sets up what it needs; `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check docs clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with the package and the developer tools

# torch first, by itself: the other packages then take it as it stands.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# One thread: the model is so small that a second gains a sixth, and on a busy machine waiting for it costs far more.
quickstart: $(READY)  ## one run from end to end on a made-up catalogue, in minutes
	OMP_NUM_THREADS=1 $(BIN)/itemtok run recipes/quickstart.yaml

test: $(READY)  ## the fast tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)  ## lint, format, types, layers, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: $(DOCS_READY)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove what is built; runs/ and .venv stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
