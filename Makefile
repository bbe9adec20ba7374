# make demo and make test set everything up by themselves on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
INSTALLED := $(VENV)/.installed

.PHONY: demo test check fix bench docs up clean
.DEFAULT_GOAL := check

$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(wildcard kernels/modelgrove_kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[cpu,server,sign,dev]'
	$(PIP) --no-deps adaptive-terrain-diffusion fuzzywuzzy immutables mergekit sd-mecha
	touch $@

demo: $(INSTALLED)
	$(BIN)/modelgrove demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -I -m pytest -n auto --dist loadfile --cov --cov-report=term:skip-covered

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	for file in bench/*.py; do $(BIN)/python $$file; done

up: $(INSTALLED)
	$(BIN)/modelgrove up

clean:
	rm -rf $(VENV) demo

docs: $(INSTALLED)
	$(BIN)/python docs/generate_cli.py
