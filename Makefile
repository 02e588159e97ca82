# Two commands do everything on a fresh machine with Python >= 3.10: `make run` and `make test`.
PYTHON ?= python3
NPROC ?= 2
WORLDS ?= 1 2 3 4 5
SHARE ?= 1
SETTINGS ?=
VENV := .venv
BIN := $(VENV)/bin
ORGANISMS := runs/organisms
# Optimizers of these packages are tested, but peft imports them wherever it finds them, which would make each of the
# tests' processes start 3 seconds later: they are kept apart, where the tests that need them look.
OPTIMIZERS := $(VENV)/optimizers
# Python compiles what it imports, which is less than half of what is installed.
PIP := $(BIN)/pip --quiet --disable-pip-version-check install --no-compile -c constraints.txt
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run run-full results test test-slow faults lint types bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "grasp_dist needs Python >= 3.10; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	$(PIP) --upgrade --no-deps --target $(OPTIMIZERS) bitsandbytes torchao
	touch $@

run: $(VENV)/.installed  ## the main job on the embedded organism, with 2 processes and FSDP2
	$(BIN)/grasp-dist organism persona --seed 1 --out $(ORGANISMS)/persona-1
	$(BIN)/grasp-dist run recipes/organism.yaml --nproc $(NPROC)

run-full: $(VENV)/.installed  ## every development world, write modules and all linear modules, 2 seeds each; SETTINGS: any of the recipe's
	for w in $(WORLDS); do \
	  $(BIN)/grasp-dist organism persona --seed $$w --out $(ORGANISMS)/persona-$$w || exit $$?; \
	  for recipe in organism organism-all; do \
	    $(BIN)/grasp-dist run recipes/$$recipe.yaml --nproc $(NPROC) --variables.organism $(ORGANISMS)/persona-$$w \
	      --run_dir runs/full/$$recipe-$$w $(SETTINGS) || exit $$?; \
	  done; \
	done
	for recipe in organism organism-all; do \
	  $(BIN)/grasp-dist report --out runs/full/report-$$recipe $(foreach w,$(WORLDS),runs/full/$$recipe-$(w)) || exit $$?; \
	done

results: $(VENV)/.installed  ## GRASP beside its alternatives, three seeds in each world: the table of docs/results.md
	for w in $(WORLDS); do \
	  $(BIN)/grasp-dist organism persona --seed $$w --out $(ORGANISMS)/persona-$$w || exit $$?; \
	  $(BIN)/grasp-dist compare recipes/alternatives.yaml --nproc $(NPROC) --variables.organism $(ORGANISMS)/persona-$$w \
	    --run_dir runs/alternatives/world-$$w $(SETTINGS) || exit $$?; \
	done
	$(BIN)/grasp-dist report --out runs/alternatives/report $(foreach w,$(WORLDS),runs/alternatives/world-$(w))

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --durations=15

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --durations=15

faults: $(VENV)/.installed-dev  ## injected faults, all of them, and their table; about 25 minutes on 2 cores (SHARE=0.1: a tenth)
	$(BIN)/python -m tests.faults --share $(SHARE)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/projector.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/detection.py
	$(BIN)/python benchmarks/growth.py
	PYTHONPATH=$(OPTIMIZERS) $(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/checkpoints.py

clean:  ## what was installed and built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info
