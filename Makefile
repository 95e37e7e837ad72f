# make demo   build barelm into .venv, then learn a vocabulary, train and sample a small GPT-2 (three minutes on two cores)
# make test   everything that needs nothing heavier than pytest
# The rest is for those who work on barelm: see `make help`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python -type f -not -name '*.so' -not -name '*.pyc')
FORMATTED := csrc/*.c csrc/*.h csrc/*.cpp cuda/*.cu cuda/*.cuh cuda/*.h cuda/*.cpp cuda/emulate/* tests/*.cu tests/*.cpp
# --no-compile: of thousands of modules few are imported, and those are compiled then.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# WERROR=ON: warnings are errors, as in .ci/run.
WERROR ?= OFF
RUNS   ?= 100000
# Two processes, for most tests are one thread of Python; each takes half of the tests in order, then helps the other.
HALVES := -n 2 --dist worksteal
# And a thread for each, but where a test asks for more: threads that find no core of their own spin more than they work.
ALONE := env BARELM_THREADS=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1

.PHONY: demo test test-peers asan tsan neon fuzz faults bench lint format clean help

demo: $(VENV)/.installed ## build, train a small GPT-2 on the standard library, sample from it
	$(BIN)/barelm demo

test: $(VENV)/.test ## all tests but those against torch and transformers
	$(ALONE) $(BIN)/python -m pytest $(HALVES) -m "not peers"

test-peers: $(VENV)/.peers ## the tests against torch, transformers and tokenizers
	$(ALONE) $(BIN)/python -m pytest $(HALVES) -m peers

asan: $(VENV)/.test ## quick tests under the address and undefined-behaviour sanitizers
	$(ALONE) sh tests/variant.sh asan $(BIN)/python $(HALVES)

tsan: $(VENV)/.test ## tests with several threads under the thread sanitizer
	sh tests/variant.sh tsan $(BIN)/python $(HALVES)

neon: $(VENV)/.test ## the kernels of 64-bit ARM on this machine; needs SIMDe (Debian: libsimde-dev)
	$(ALONE) sh tests/variant.sh neon $(BIN)/python $(HALVES)

fuzz: $(VENV)/.fuzz ## changed files for every reader, guided by what they reach, under the sanitizers; RUNS=100000 SEED=1
	sh tests/fuzz.sh $(BIN)/python -runs=$(RUNS) $(SEED:%=-seed=%)

faults: $(VENV)/.test ## plant faults in a copy of the source and see the tests catch each
	$(BIN)/python tests/faults.py

bench: $(VENV)/.peers ## machine peak, operators; whole steps against PyTorch and how they grow, decoding against llama.cpp
	$(BIN)/python benchmarks/bench_ops.py
	$(BIN)/python benchmarks/bench_model.py
	$(BIN)/python benchmarks/bench_growth.py
	$(BIN)/python benchmarks/bench_decode.py

lint: $(VENV)/.lint ## ruff and clang-format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.lint ## let ruff and clang-format mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean: ## remove what was built; runs/ stays
	rm -rf $(VENV) build

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "barelm needs Python 3.11 or newer, this is %s: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python $(SOURCES)
	$(PIP) -Ccmake.define.BARELM_WERROR=$(WERROR) .
	@touch $@

# The extras of pyproject.toml alone: `pip install '.[test]'` would build the extension a second time.
extra = $(shell $(BIN)/python -c "import shlex, tomllib; print(shlex.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$(1)']))")

$(VENV)/.test: $(VENV)/.installed pyproject.toml
	$(PIP) $(call extra,test)
	@touch $@

$(VENV)/.peers: $(VENV)/.test
	$(PIP) $(call extra,peers)
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	$(PIP) $(call extra,fuzz)
	@touch $@

$(VENV)/.lint: $(VENV)/.python
	$(PIP) ruff==0.17.6 clang-format==19.1.7
	@touch $@
