# make run   from raw data to results/<run>/MODEL_CARD.md
# make test  linters, unit tests, dry runs, the whole chain (in this environment and under conda)
# Both set up .venv first, when it is not there or the pins changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= all

.DELETE_ON_ERROR:
.PHONY: run test lint clean

run: $(VENV)/ready
	$(BIN)/snakemake --cores $(CORES)

test: $(VENV)/ready-dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf results logs benchmarks .snakemake
