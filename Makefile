# All commands for contributors. You need Python 3.10 or newer (with venv) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORK := build/demo
BENCH := build/bench
PICTURES := build/pictures
MODEL := examples/tiny-relu
# Which versions to install: constraints-oldest.txt, or /dev/null for the newest of everything.
CONSTRAINTS ?= constraints.txt

CASES := 5000
SEED := 1

# Python keeps what it compiles, or every process that a test starts would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test fuzz sweep bench lint format docs clean

help:
	@echo "make demo    run the whole pipeline on the example model"
	@echo "make test    run the tests"
	@echo "make bench   run the benchmarks that need no other data"
	@echo "make fuzz    mutate every kind of file for some minutes"
	@echo "make sweep   send a tiny model of every model type of transformers through all stages"
	@echo "make lint    check with ruff, mypy and import-linter"
	@echo "make format  reformat the code"
	@echo "make docs    regenerate docs/cli.md, docs/supported.md and docs/images"
	@echo "make clean   remove what make built, but keep the environment"

# Python compiles what it imports, and keeps it; compiling all that is installed takes longer than the rest.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# Two stamp files: the demo installs what users need; tests and lint also install the development tools.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) -c $(CONSTRAINTS) -e '.[hf]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) -c $(CONSTRAINTS) -e '.[hf,dev]'
	touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	rm -rf $(WORK) && mkdir -p $(WORK)
	$(BIN)/neuralink profile $(MODEL) --dataset examples/text/calibration.txt --num-samples 0 \
		-o $(WORK)/tiny.trace.safetensors
	$(BIN)/neuralink cluster $(WORK)/tiny.trace.safetensors -o $(WORK)/tiny.placement.safetensors
	$(BIN)/neuralink relayout $(MODEL) --placement $(WORK)/tiny.placement.safetensors -o $(WORK)/tiny-flash
	$(BIN)/neuralink verify $(MODEL) $(WORK)/tiny-flash

# With worksteal each worker goes through the tests of whole rooms: what these share is mostly made once. Three of them,
# as some tests wait for processes and disks.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 3 --dist worksteal

# Small sizes, for a machine with two cores: `python benchmarks/NAME.py --help` says how to run each in full.
bench: $(VENV)/.installed-dev
	rm -rf $(BENCH) && mkdir -p $(BENCH)
	$(BIN)/neuralink profile $(MODEL) --dataset examples/text/calibration.txt --num-samples 0 -q \
		-o $(BENCH)/tiny.trace.safetensors
	$(BIN)/neuralink cluster $(BENCH)/tiny.trace.safetensors -q -o $(BENCH)/tiny.placement.safetensors
	$(BIN)/neuralink bench $(BENCH)/tiny.placement.safetensors --trace $(BENCH)/tiny.trace.safetensors -q
	$(BIN)/python benchmarks/paper_reproduction.py $(BENCH)/tiny.trace.safetensors --bundle-bytes 4096 16384
	$(BIN)/python benchmarks/phones.py $(BENCH)/tiny.trace.safetensors --bundle-bytes 4096 16384
	$(BIN)/python benchmarks/order_quality.py $(BENCH)/tiny.trace.safetensors --ratio 1 4 --pinned 0 0.05
	$(BIN)/python benchmarks/counting.py --neurons 4096 --tokens 8192
	$(BIN)/python benchmarks/linking.py --neurons 4096 --tokens 8192 --reference-neurons 1024
	$(BIN)/python benchmarks/cluster_7b.py --blocks 2 --neurons 4096 --tokens 8192 --folder $(BENCH)
	$(BIN)/python benchmarks/profile_overhead.py --model $(MODEL) --no-random --rounds 7
	$(BIN)/python benchmarks/relayout_speed.py --gigabytes 0.8 --folder $(BENCH)
	$(BIN)/python benchmarks/weight_formats.py --neurons 2048 --hidden 2048

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Some minutes: mutated files of every kind through every command that reads them (docs/fuzzing.md).
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.long.fuzz --cases $(CASES) --seed $(SEED)

# Some twenty minutes. `make docs` makes a section of docs/supported.md from what it writes.
sweep: $(VENV)/.installed-dev
	$(BIN)/python -m tests.long.sweep_architectures --output docs/model_types.json

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_supported.py
	rm -rf $(PICTURES) && mkdir -p $(PICTURES)
	$(BIN)/neuralink profile $(MODEL) --dataset examples/text/calibration.txt --num-samples 0 -q \
		-o $(PICTURES)/tiny.trace.safetensors
	$(BIN)/neuralink cluster $(PICTURES)/tiny.trace.safetensors -q -o $(PICTURES)/tiny.placement.safetensors
	$(BIN)/python docs/generate_images.py $(PICTURES)/tiny.placement.safetensors $(PICTURES)/tiny.trace.safetensors

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
