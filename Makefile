# All commands for contributors. You need Python 3.10 or newer (with venv) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORK := build/demo
MODEL := examples/tiny-relu

CASES := 5000
SEED := 1

.PHONY: help demo test fuzz lint format docs clean

help:
	@echo "make demo    run the whole pipeline on the example model"
	@echo "make test    run the tests"
	@echo "make fuzz    mutate every kind of file for some minutes"
	@echo "make lint    check with ruff and mypy"
	@echo "make format  reformat the code"
	@echo "make docs    regenerate docs/cli.md and docs/supported.md"
	@echo "make clean   remove what make built, but keep the environment"

# Two stamp files: the demo installs what users need; tests and lint also install the development tools.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,dev]'
	touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	rm -rf $(WORK) && mkdir -p $(WORK)
	$(BIN)/neuralink profile $(MODEL) --dataset examples/text/calibration.txt --num-samples 0 \
		-o $(WORK)/tiny.trace.safetensors
	$(BIN)/neuralink cluster $(WORK)/tiny.trace.safetensors -o $(WORK)/tiny.placement.safetensors
	$(BIN)/neuralink relayout $(MODEL) --placement $(WORK)/tiny.placement.safetensors -o $(WORK)/tiny-flash
	$(BIN)/neuralink verify $(MODEL) $(WORK)/tiny-flash

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Some minutes: mutated files of every kind through every command that reads them (docs/fuzzing.md).
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.long.fuzz --cases $(CASES) --seed $(SEED)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_supported.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
