# Every target makes its own environment: `make demo` and `make test` work on a fresh clone with Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SCALE ?= full
export OMP_NUM_THREADS ?= 2
export WANDB_SILENT ?= true
export HYDRA_FULL_ERROR ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format backbones clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moevlm needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.installed  ## Make the environment in .venv

demo: setup  ## Train, distil, evaluate and explain a sparse VLM in the miniature world (2 CPU cores, under 20 minutes)
	$(BIN)/python -m experiments.pipeline pipeline=demo

test: setup  ## Run the default tests with coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow and not gpu" --cov --cov-report=term --cov-fail-under=85

test-slow: setup  ## Run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

lint: setup  ## Check format, style, types and who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

backbones: setup  ## Pretrain the miniature world's backbones and teacher (SCALE=tiny: a two-step check)
	$(BIN)/python -m experiments.pretrain_backbones scale=$(SCALE)

clean:  ## Remove the environment and the outputs
	rm -rf $(VENV) outputs
