# Everything runs in .venv. Each target creates it if it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One process per core with one thread each, because torch's threads would wait for each other. Files
# keep their order: the plugin would run files with few tests last, and these take longest.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
EVERY_DAY := not gpu and not nightly
# workers, one more than cores, at most 4: tests of processes wait for each other and for timeouts
ONE_MORE := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores + 1 : 4)))
SERVICE ?= pypi
WORK ?= runs/results
SECONDS ?= 1800
MINUTES ?= 60
SOAK ?= runs/soak
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

# Containers often set it. Then every process, of which the tests start hundreds, compiles the sources
# of torch, diffusers and the rest again, because nothing is kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo docs results results-page distillation bench bench-check test unit processes daily nightly format lint types comfyui test-comfyui check lock constraints audit licences fuzz golden pairs soak reliability \
	wheel clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## create .venv with the pinned versions, every file checked by its hash

$(STAMP): pyproject.toml constraints.txt requirements.lock
	PYTHON=$(PYTHON) tools/install.sh .venv requirements.lock
	touch $@

# All extras, to read their licences and sizes. torchvision and torchao are not run there.
.venv-all/.installed: pyproject.toml constraints.txt requirements.lock requirements-extras.lock
	PYTHON=$(PYTHON) tools/install.sh .venv-all requirements.lock requirements-extras.lock
	touch $@

.venv-tools/.installed: tools/requirements.lock
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet --require-hashes --no-deps --only-binary :all: -r $<
	touch $@

demo: install ## train an ensemble on the emoji scenes and compare it (OUT=folder)
	$(BIN)/afa demo --output $(OUT)

results: install ## ask when the ensemble pays (STAGE=worlds, development, candidates, trainings or test; EXPERIMENT=main; days; resumes)
	$(BIN)/afa zoo results $(WORK) --docs docs $(if $(STAGE),--stage $(STAGE)) $(if $(EXPERIMENT),--experiment $(EXPERIMENT))

results-page: install ## write docs/results.json, and tables and figures of docs/results.md, from the committed outcomes
	$(BIN)/afa zoo results-page --docs docs

distillation: install ## distil the bundled ensemble, write docs/distillation.json (WORK=folder; hours; PART=main; resumes)
	$(BIN)/afa zoo distillation $(WORK)-distillation --docs docs $(if $(PART),--part $(PART))

bench: install .venv-all/.installed ## measure speed and memory, write docs/benchmarks.md (an hour)
	$(BIN)/python -m benchmarks.run

bench-check: install ## compare step times, relative to the experts', with the committed ones (minutes)
	$(BIN)/python -m benchmarks.run --check

soak: install ## draw and train repeatedly; check that no resource grows (MINUTES=60, SOAK=folder)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --output $(SOAK)

docs: install ## build the documentation site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pairs: install ## test every pair of features, write the table in docs/compatibility.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pairs

golden: install ## compare results on tiny models with the golden record, bit for bit (WRITE=--write records)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden $(WRITE)

fuzz: install ## fuzz the file readers, write docs/fuzz.json (SECONDS=1800 for all; Linux)
	sed -n '/^\(atheris\|coverage\)==/,/[^\\]$$/p' requirements-extras.lock > .venv/fuzz.lock
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r .venv/fuzz.lock
	$(BIN)/python -m fuzz.run --seconds $(SECONDS) --docs docs

reliability: install ## inject every fault, write docs/reliability.json and its page (half an hour)
	$(PYTEST) -m fault --reliability=docs/reliability.json

test: install ## run the quick tests
	$(PYTEST) -m "$(EVERY_DAY) and not slow and not processes"

unit: install ## run all single-process tests
	$(PYTEST) -m "$(EVERY_DAY) and not processes"

processes: install ## run the tests that start processes or inject faults
	$(PYTEST) -n $(ONE_MORE) -m "$(EVERY_DAY) and processes"

# both together: while processes wait for each other, other tests use the cores
daily: install ## run unit and processes
	$(PYTEST) -n $(ONE_MORE) -m "$(EVERY_DAY)"

nightly: install ## run the long tests: site, soak, studies, zoo builds (half an hour)
	$(BIN)/python -m tools.nightly

format: install ## format the code and fix lint errors
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install ## check format, lint rules and import layers; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: install ## run the type checker, also for the functions that Windows and macOS have
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 src
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin src

comfyui: install ## test integrations/comfyui with ComfyUI's core, in build/comfyui
	$(BIN)/python -m tools.comfyui --install build/comfyui
	COMFYUI=build/comfyui OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 integrations/comfyui/tests

test-comfyui: install ## run the nodes in a real ComfyUI server, in build/comfyui-server (18 GB, 20 minutes)
	$(BIN)/python -m tools.comfyui_server build/comfyui-server

check: lint types daily comfyui ## run everything that CI runs

lock: .venv-tools/.installed ## write the lock files again, with the current pins
	PYTHONPATH=src .venv-tools/bin/python -m tools.lock $(if $(WHEELS),--wheels $(WHEELS))

constraints: .venv-tools/.installed ## upgrade all pins to the newest compatible versions, except torch
	PYTHONPATH=src .venv-tools/bin/python -m tools.lock --newest $(if $(WHEELS),--wheels $(WHEELS))

audit: .venv-tools/.installed ## look up security advisories for all pins (SERVICE=pypi or osv; needs a network)
	PYTHONPATH=src .venv-tools/bin/python -m tools.audit --service $(SERVICE)

licences: install .venv-all/.installed ## write docs/licences.md from the installed distributions
	$(BIN)/python -m tools.licences .venv-all

wheel: install ## build the wheel; the same commit gives the same bytes
	$(BIN)/python -m tools.wheel

clean: ## remove everything that can be built again
	rm -rf .venv .venv-all .venv-tools build dist .mypy_cache .pytest_cache .ruff_cache
