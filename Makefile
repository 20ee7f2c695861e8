# make <target>. Every target sets up .venv by itself, and again only when setup.cfg or the pins change.

PYTHON ?= python3
ARGS ?=
DATA ?=
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt
# DeepSpeed builds its CPU collectives with the ninja that lies beside it.
RUN := PATH="$(BIN):$$PATH"
PYTEST := $(RUN) python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
TRAIN := launcher/train.py --ds_config ds_configs/zero3.json --resume auto --max_steps 60

.DEFAULT_GOAL := help
.PHONY: help setup train unit smoke test test-all chaos lint docs bench bench-methods

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */  make \1\t/p' Makefile | expand -t 24

setup: $(STAMP)  ## .venv with everything pinned

train: $(STAMP)  ## fine-tune the embedded model on all GPUs, or on 2 CPU ranks (ARGS="--max_steps 50 ...")
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then $(RUN) deepspeed --quiet $(TRAIN) $(ARGS); \
	else $(RUN) DS_ACCELERATOR=cpu deepspeed --quiet --num_gpus 2 $(TRAIN) $(ARGS); fi

unit: $(STAMP)  ## tests that start no process: under a minute
	@$(PYTEST) -m unit $(ARGS)

smoke: $(STAMP)  ## a law of every method, resume, export, a launcher: about three minutes
	@$(PYTEST) -m smoke $(ARGS)

test: $(STAMP)  ## the tests of every change (ARGS="-k config ...")
	@$(PYTEST) -m "not full" $(ARGS)

test-all: $(STAMP)  ## all tests, the whole grid of laws with them, and chaos: for a release
	@$(PYTEST) $(ARGS)
	@$(RUN) python -m tests.chaos

chaos: $(STAMP)  ## kill a run at 100 drawn moments, compare each end with the undisturbed one's
	@$(RUN) python -m tests.chaos $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy

docs: $(STAMP)  ## the documentation as a site in build/site; a dead link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The pages of docs/results come from what the others leave.
bench: $(STAMP)  ## every benchmark in benchmarks/, one after the other (DATA=FOLDER of gsm8k/, cola/ ...)
	@for script in $(filter-out %/docs_tables.py,$(wildcard benchmarks/[a-z]*.py)) benchmarks/docs_tables.py; do \
		echo "== $$script"; $(RUN) DATA="$(DATA)" python "$$script" || exit 1; \
	done

bench-methods: $(STAMP)  ## all methods at about the same number of parameters, side by side; resumable
	@$(RUN) python benchmarks/family.py

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "setup: needs Python 3.11 or newer, and $(PYTHON) is not that; try make setup PYTHON=python3.11"; \
		exit 1; }
	@echo "setup: making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing torch"
	@$(PIP) torch
	@echo "setup: installing DeepSpeed, transformers and the rest"
	@$(PIP) --editable '.[dev]'
	@touch $@
	@echo "setup: done"
