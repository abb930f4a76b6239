# Every target runs through the project's own environment, .venv, and makes it first where it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MPLBACKEND ?= agg
export JUPYTER_PATH := $(CURDIR)/$(VENV)/share/jupyter
export PYTHONHASHSEED := 0

.PHONY: demo test docs lab bench clean export
.DEFAULT_GOAL := demo

$(VENV)/.installed: setup.py settings.ini constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,docs]"
	@touch $@

demo: $(VENV)/.installed  ## the main job on the embedded cohort
	bmdx run eos/transfer --preset demo

test: $(VENV)/.installed  ## notebooks' own checks, pytest, smoke presets
	nbdev_test --n_workers 2 --do_print
	pytest -q -n 2 --dist loadgroup tests

docs: $(VENV)/.docs-installed  ## the documentation site, in _docs/
	$(BIN)/python docs/build.py

lab: $(VENV)/.installed  ## JupyterLab, open on the tour
	jupyter lab nbs/85_tour.ipynb

bench: $(VENV)/.installed  ## speed of the projector, against others where they are installed
	bmdx bench

export: $(VENV)/.installed
	nbdev_export && nbdev_clean

clean:
	rm -rf data/cache data/runs figures/smoke _docs docs/_build .pytest_cache .ruff_cache
