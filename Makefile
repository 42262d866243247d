# Everything runs in .venv, which each target sets up when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# a process a core, of one thread each: torch's threads would wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile
WORK ?= runs/results
MINUTES ?= 60
SOAK ?= runs/soak
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help install demo docs results results-dit bench bench-check soak test test-all format lint types check constraints clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## set up .venv from the pinned versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install ## train an ensemble on the emoji scenes and compare it (OUT=folder)
	$(BIN)/afa demo --output $(OUT)

results: install ## train and compare everything, write docs/results.md (over an hour; goes on)
	$(BIN)/afa zoo results $(WORK) --docs docs

results-dit: install ## the same on transformers, a section of it (WORK=folder; 90 minutes, goes on)
	$(BIN)/afa zoo build $(WORK)-dit-zoo --family dit
	$(BIN)/afa zoo results $(WORK)-dit --zoo $(WORK)-dit-zoo --docs docs

bench: install ## measure speed and memory, write docs/benchmarks.md (an hour)
	$(BIN)/python -m benchmarks.run

bench-check: install ## are steps as fast, by the experts' own, as is committed? (minutes)
	$(BIN)/python -m benchmarks.run --check

soak: install ## draw and train over and over: does anything grow? (MINUTES=60, SOAK=folder)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --output $(SOAK)

docs: install ## the pages as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: install ## the quick tests
	$(PYTEST) -m "not slow and not gpu"

test-all: install ## all tests but those that need a GPU
	$(PYTEST) -m "not gpu"

format: install ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install ## formatter and linter, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install ## type checker
	$(BIN)/mypy

check: lint types test-all ## everything that CI runs

constraints: ## pin the newest versions that work together
	rm -rf .venv-pins
	$(PYTHON) -m venv .venv-pins
	.venv-pins/bin/python -m pip install --quiet torch==2.13.0
	.venv-pins/bin/python -m pip install --quiet -e '.[dev]'
	{ sed '/^[^#]/d' constraints.txt; .venv-pins/bin/python -m pip freeze --exclude-editable \
		| sed 's/+cpu$$//' | grep -v '^nvidia-\|^triton'; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-pins

clean: ## remove what can be made again
	rm -rf .venv .venv-pins build dist .mypy_cache .pytest_cache .ruff_cache
