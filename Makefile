# make run and make test each work as the only command on a fresh clone. `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
PIP = $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: help run test gates notebooks outputs pytest tiny sample reference readme docs bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

run: $(VENV)/.run  ## install, then run the improvement loop on the sample traffic
	@$(BIN)/soma improve

test: gates notebooks pytest  ## the three gates, every notebook, pytest

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3,11) else f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.11 …")'
	@echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing somaagent[train]: some minutes the first time"
	@$(PIP) -e '.[train]'; touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing somaagent[dev]: some minutes the first time"
	@$(PIP) -e '.[dev]'; touch $@ $(VENV)/.run

gates: $(VENV)/.dev  ## gates 1 and 2: clean leaves no diff, export leaves no diff
	@$(BIN)/python tests/gates.py

notebooks: $(VENV)/.dev  ## gate 3: every notebook runs, and its saved outputs are current
	@$(BIN)/python tests/notebooks.py

outputs: $(VENV)/.dev  ## run every notebook and save its outputs, figures also as pictures (needs Chromium)
	@$(BIN)/python tests/notebooks.py --save

pytest: $(VENV)/.dev  ## faults, servers, concurrency, properties, the layout's own rules
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 5

tiny: $(VENV)/.run  ## train the offline base model again (minutes)
	@$(BIN)/python -m somaagent.train.tiny --out data/tiny

sample: $(VENV)/.run  ## write the sample traffic again
	@$(BIN)/python -m somaagent.data.supportdesk --out data/support_desk

reference: $(VENV)/.run  ## run the main job anew and write the figures that the README shows
	@$(BIN)/python benchmarks/reference.py

readme: $(VENV)/.dev  ## README.md from nbs/index.ipynb
	@$(BIN)/python tests/readme.py --write

docs: $(VENV)/.dev  ## the documentation site (needs quarto)
	@nbdev-docs

bench: $(VENV)/.run  ## what is claimed about speed, as tables (about ten minutes)
	@for b in startup warehouse improve; do $(BIN)/python benchmarks/$$b.py; done

clean:  ## remove what was installed and every run
	rm -rf $(VENV) .soma build dist *.egg-info _proc _docs
