# Everything runs in .venv, which each target sets up when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# a process a core, of one thread each: torch's threads would wait for each other; files in their
# own order, since those of few tests, which the plugin would put last, are the longest
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
EVERY_DAY := not gpu and not nightly
SERVICE ?= pypi
WORK ?= runs/results
SECONDS ?= 1800
MINUTES ?= 60
SOAK ?= runs/soak
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help install demo docs results results-dit bench bench-check test unit processes nightly format lint types check lock constraints audit licences fuzz golden pairs soak reliability \
	wheel clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## set up .venv from the pinned versions, every file checked by its hash

$(STAMP): pyproject.toml constraints.txt requirements.lock
	PYTHON=$(PYTHON) tools/install.sh .venv requirements.lock
	touch $@

# all extras, to read their licences and sizes; torchvision and torchao need not run there
.venv-all/.installed: pyproject.toml constraints.txt requirements.lock requirements-extras.lock
	PYTHON=$(PYTHON) tools/install.sh .venv-all requirements.lock requirements-extras.lock
	touch $@

.venv-tools/.installed: tools/requirements.lock
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet --require-hashes --no-deps --only-binary :all: -r $<
	touch $@

demo: install ## train an ensemble on the emoji scenes and compare it (OUT=folder)
	$(BIN)/afa demo --output $(OUT)

results: install ## train and compare everything, write docs/results.md (over an hour; goes on)
	$(BIN)/afa zoo results $(WORK) --docs docs

results-dit: install ## the same on transformers, a section of it (WORK=folder; 90 minutes, goes on)
	$(BIN)/afa zoo build $(WORK)-dit-zoo --family dit
	$(BIN)/afa zoo results $(WORK)-dit --zoo $(WORK)-dit-zoo --docs docs

bench: install .venv-all/.installed ## measure speed and memory, write docs/benchmarks.md (an hour)
	$(BIN)/python -m benchmarks.run

bench-check: install ## are steps as fast, by the experts' own, as is committed? (minutes)
	$(BIN)/python -m benchmarks.run --check

soak: install ## draw and train over and over: does anything grow? (MINUTES=60, SOAK=folder)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --output $(SOAK)

docs: install ## the pages as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pairs: install ## try every feature with every other, write the table of docs/compatibility.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pairs

golden: install ## are results on tiny models as they were, to the bit? (WRITE=--write records them)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden $(WRITE)

fuzz: install ## feed the readers of files, write docs/fuzz.json (SECONDS=1800 for all; Linux)
	sed -n '/^\(atheris\|coverage\)==/,/[^\\]$$/p' requirements-extras.lock > .venv/fuzz.lock
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r .venv/fuzz.lock
	$(BIN)/python -m fuzz.run --seconds $(SECONDS) --docs docs

reliability: install ## provoke every fault, write docs/reliability.json and its page (half an hour)
	$(PYTEST) -m fault --reliability=docs/reliability.json

test: install ## the quick tests
	$(PYTEST) -m "$(EVERY_DAY) and not slow and not processes"

unit: install ## all tests of one process
	$(PYTEST) -m "$(EVERY_DAY) and not processes"

processes: install ## tests that start processes or provoke faults
	$(PYTEST) -m "$(EVERY_DAY) and processes"

nightly: install ## the site, and tests of minutes: soak, studies, zoo builds (half an hour)
	$(BIN)/python -m tools.nightly

format: install ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install ## formatter and linter, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: install ## type checker
	$(BIN)/mypy

check: lint types unit processes ## everything that CI runs

lock: .venv-tools/.installed ## write the pins anew: pyproject.toml's, at the versions that they have
	PYTHONPATH=src .venv-tools/bin/python -m tools.lock $(if $(WHEELS),--wheels $(WHEELS))

constraints: .venv-tools/.installed ## pin the newest versions that work together (but for torch)
	PYTHONPATH=src .venv-tools/bin/python -m tools.lock --newest $(if $(WHEELS),--wheels $(WHEELS))

audit: .venv-tools/.installed ## are there advisories on what is pinned? Asks the package index
	PYTHONPATH=src .venv-tools/bin/python -m tools.audit --service $(SERVICE)

licences: install .venv-all/.installed ## read them from what is installed: docs/licences.md
	$(BIN)/python -m tools.licences .venv-all

wheel: install ## build the wheel, the same bytes for the same commit
	$(BIN)/python -m tools.wheel

clean: ## remove what can be made again
	rm -rf .venv .venv-all .venv-tools build dist .mypy_cache .pytest_cache .ruff_cache
