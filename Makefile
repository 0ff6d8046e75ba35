# make run   from raw data to results/<run>/MODEL_CARD.md
# make ask   asks the model of the last run: make ask Q="find log files larger than 10 MB"; without Q a prompt
# make test  linters, and the tests that protect while one works: each room, each rule, a tiny chain; on all cores,
#            WORKERS=1 for one (minutes)
# make test-all   everything but what a night is for: make test and make test-rest (what it leaves out) at once, and these:
#   make test-conda   the chain in conda environments
#   make test-slurm   a sweep on a real one-node Slurm, a job killed and requeued
#   make test-deepspeed, test-optimizers, test-kernels, test-mcp, test-recipes   ZeRO, torchao's and GaLore's optimizers,
#                     Triton kernels with Liger's package, the tools for assistants, programs with diffusers,
#                     sentence-transformers and timm, each in an environment of its own beside .venv
#   make test-site    the site in a browser
# make test-night  each night: what differs from a test of make test-all in sizes, pairs or models alone; each model of
#                  config/models/ traced whole, each published size of a module (hours)
# make test-drift   each night: a published row of each source with the versions that were measured, three timed rows
# make site   the calculator and the documents as static files in site/
# make example   the default run, its documents as docs/example/, a small sweep, and the site with both
# make lock   renews uv.lock
# run and test set up .venv first, when it is not there or the pins changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= all
WORKERS ?= logical
INSTALL = $(PYTHON) envs/install.py
# Where Python may not keep what it compiles, each process compiles the project, and each test session its asserts, anew.
export PYTHONDONTWRITEBYTECODE :=

.DELETE_ON_ERROR:
.PHONY: run test test-rest test-all test-conda test-slurm test-night test-drift test-deepspeed test-optimizers
.PHONY: test-kernels test-site test-mcp test-recipes site example lint lock clean ask

run: $(VENV)/ready
	$(BIN)/snakemake --cores $(CORES)

# The request reaches the program by the environment: no quote in it can end up in the shell's own line.
ask: export ASKED := $(value Q)
ask: $(VENV)/ready
	@set -f; if [ -n "$$ASKED" ]; then $(BIN)/python -m scripts.try_model -- "$$ASKED"; else $(BIN)/python -m scripts.try_model; fi

# What a test is marked `thorough` or `nightly` for stands in tests/tiers.py.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8
test: $(VENV)/ready-dev
	@echo "make test: linters, then $$($(BIN)/python -m tests.tiers test)"
	@$(MAKE) --no-print-directory lint
	$(PYTEST) -m "not thorough"

test-rest: $(VENV)/ready-dev
	$(PYTEST) -m "thorough and not nightly"

# The last ones are one process each that waits now and then: two at a time, the longest first, each one's output whole.
WHEN := not nightly
ELSEWHERE := test-slurm test-kernels test-conda test-site test-deepspeed test-optimizers test-mcp test-recipes
AT_NIGHT := test-kernels test-site test-deepspeed test-optimizers test-recipes # the others have no test for the night
test-all: $(VENV)/ready-dev
	@echo "make test-all: $$($(BIN)/python -m tests.tiers test-all); then $(ELSEWHERE) (8 minutes)"
	@$(MAKE) --no-print-directory lint
	$(PYTEST) -m "not nightly"
	@$(MAKE) --no-print-directory -j2 --output-sync=target --keep-going $(ELSEWHERE)

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

# Where conda-forge can't be reached, with a conda that is made out of PyPI's packages.
test-conda: $(VENV)/ready-dev
	$(BIN)/python -m pytest -m "$(WHEN)" tests/conda

# A one-node Slurm, installed where it is missing and this is root on Debian; otherwise the tests say what to install.
test-slurm: $(VENV)/ready-dev
	tests/slurm/install.sh
	$(INSTALL) $(VENV) --group slurm
	$(BIN)/python -m pytest -m "$(WHEN)" tests/slurm

test-night: $(VENV)-run/liger-kernel
	$(BIN)/python -m pytest -n $(WORKERS) --dist=load tests/nightly/test_catalogue.py tests/nightly/test_every_size.py \
	  tests/nightly/test_operators.py
	$(PYTEST) --dist=load -m nightly
	LIGER_CHECKOUT=$< $(VENV)-run/bin/python -m pytest tests/nightly/test_liger_commits.py
	@$(MAKE) --no-print-directory --keep-going WHEN=nightly $(AT_NIGHT)

# The history of Liger-Kernel: each published row runs the package of its commit. `LIGER=path` takes a clone that is
# there already, and without either the rows are skipped.
LIGER ?= https://github.com/linkedin/Liger-Kernel
$(VENV)-run/liger-kernel: $(VENV)-run/ready
	git clone --quiet --no-checkout $(LIGER) $@ || echo "Liger-Kernel's history can't be had: its rows are skipped"

PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

# Each environment of envs/validation-*.yaml has its versions beside .venv's packages; rows of others are skipped there.
VALIDATED := $(patsubst envs/validation-%.yaml,$(VENV)-validation-%,$(wildcard envs/validation-*.yaml))

test-drift: $(VENV)/ready-dev $(VALIDATED:%=%/ready)
	for place in $(VENV) $(VALIDATED); do $$place/bin/python -m pytest tests/nightly/test_drift.py || exit 1; done

$(VENV)-validation-%/ready: envs/validation-%.yaml $(VENV)/ready-dev
	$(PYTHON) -m venv --without-pip $(VENV)-validation-$*
	$(BIN)/python -c '$(PACKAGES)' > "$$($(VENV)-validation-$*/bin/python -c '$(PACKAGES)')/project.pth"
	$(BIN)/python -m pip --python $(VENV)-validation-$*/bin/python install --quiet --disable-pip-version-check $$(sed -n 's/^      - \([a-z]*==[^ ]*\).*/\1/p' $<)
	@touch $@

# DeepSpeed has an environment of its own: where it can be imported accelerate behaves otherwise. All else is .venv's.
test-deepspeed: $(VENV)-deepspeed/ready
	$(VENV)-deepspeed/bin/python -m pytest -m "$(WHEN)" tests/dryfit/engine/test_fake_deepspeed.py tests/unit/test_private_names.py tests/dryfit/tracing/test_zero.py

# Where torchao can be imported PEFT and transformers import it.
test-optimizers: $(VENV)-optimizers/ready
	$(VENV)-optimizers/bin/python -m pytest -m "$(WHEN)" tests/dryfit/step/test_optimizers.py tests/dryfit/step/test_low_precision.py tests/unit/training/test_optimizer_checkpoints.py tests/dryfit/engine/test_anybodys_step.py

# Where triton can be imported PyTorch and packages take other ways.
KERNEL_TESTS = $(addprefix tests/dryfit/engine/test_,launches.py card.py compiled_steps.py cuda_graphs.py extensions.py) \
  tests/dryfit/program/test_compiled_run.py tests/dryfit/tracing/test_simulated_card.py tests/dryfit/tracing/test_kernel_packages.py \
  tests/unit/test_private_names.py tests/validation/test_modded_nanogpt.py tests/validation/test_liger_package.py
test-kernels: $(VENV)-run/ready
	$(VENV)-run/bin/python -m pytest -m "$(WHEN)" $(KERNEL_TESTS)

site: $(VENV)-site/ready
	$(VENV)-site/bin/python -m dryfit.site.build

example: run
	$(BIN)/python -m tests.unit.documents.example take
	$(BIN)/snakemake --cores $(CORES) --configfile config/test.yaml tests/config/sweep.yaml -- results/tiny-sweep/SWEEP.md
	$(MAKE) site

test-site: $(VENV)-site/ready
	$(VENV)-site/bin/python -m pytest -m "$(WHEN)" tests/site

test-mcp: $(VENV)-mcp/ready
	$(VENV)-mcp/bin/python -m pytest -m "$(WHEN)" tests/mcp

# Recipes that need a package of their own.
test-recipes: $(VENV)-recipes/ready
	$(VENV)-recipes/bin/python -m pytest -m "$(WHEN)" tests/dryfit/recipes

lock:
	$(INSTALL) $(VENV) --lock

$(VENV)/ready: uv.lock pyproject.toml envs/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Name another one: make PYTHON=python3.12")'
	$(INSTALL) $(VENV) --group run
	@printf '#!/bin/sh\nPYTHONPATH="%s$${PYTHONPATH:+:$$PYTHONPATH}" exec "%s/python" -P -m scripts.ask "$$@"\n' \
	  "$(CURDIR)" "$(CURDIR)/$(BIN)" > $(BIN)/dryfit && chmod +x $(BIN)/dryfit
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(INSTALL) $(VENV) --group dev
	@touch $@

BESIDE := $(foreach extra,deepspeed mcp optimizers recipes run site,$(VENV)-$(extra)/ready)
$(BESIDE): $(VENV)-%/ready: $(VENV)/ready-dev
	$(INSTALL) $(VENV)-$* --extra $* --beside $(VENV)
	@touch $@

clean:
	rm -rf results/*/ logs benchmarks .snakemake site
