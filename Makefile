# Every target sets up what it needs: on a machine with git, Python >= 3.11, g++, make and a package index, each of
# `make quickstart` and `make test` is the only command. PYTHON=... chooses the interpreter of .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CXX ?= g++
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/cpu-py311.txt
STAMP := $(VENV)/.installed
CPP_SOURCES := $(wildcard cpp/src/*.cpp)
CPP_HEADERS := $(wildcard cpp/include/aer/*.hpp)
CPP_TESTS := $(wildcard cpp/tests/test_*.cpp)
BINDINGS := $(wildcard cpp/bindings/*.cpp cpp/bindings/*.hpp)
CPP_ALL := $(CPP_SOURCES) $(CPP_HEADERS) $(BINDINGS) $(wildcard cpp/tests/*.cpp)
IMPORT_LAYER_TEST := $(wildcard tests/project/test_import_layers.py)
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: help install quickstart smollm2 test test-fast test-slow test-gpu test-sglang test-multinode test-browser test-cpp lint format check-cpp docs audit wheel clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## .venv with pinned dependencies and the C++ extension (nothing to do when it is current)

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) $(CPP_SOURCES) $(CPP_HEADERS) $(BINDINGS)
	@bash tools/bootstrap.sh "$(VENV)" "$(PYTHON)" "$(CXX)"
	@echo "install: packages into $(VENV) (a few minutes the first time)"
	@$(PIP) install --constraint $(CONSTRAINTS) setuptools wheel pybind11
	@$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[test]'
	@touch $@
	@echo "install: done"

quickstart: install ## train the small base policy with AER on 2 cores and draw the picture
	@bash examples/quickstart/run.sh

smollm2: install ## three AER steps of SmolLM2-135M-Instruct with TP=2
	@bash examples/smollm2/run.sh

test: install $(if $(LINT),,lint) ## lint, then the fast tests
	@$(PYTEST) -m "not slow and not gpu and not sglang and not multinode and not browser"

test-fast: install ## the tests that start no process, the loop to develop by: some two minutes on two quiet cores
	@$(PYTEST) -m "not processes and not slow and not gpu and not sglang and not multinode and not browser"

test-slow: install ## the tests that take minutes
	@$(PYTEST) -m "slow and not gpu and not sglang and not multinode and not browser"

test-sglang: install ## the tests against real SGLang servers on the CPU, in an environment of their own
	@bash tools/install_sglang_cpu.sh .venv-sglang $(BIN)/python
	@$(PYTEST) -m sglang

test-multinode: install ## two nodes on this machine, one of them lost (network namespaces, else loopback)
	@$(PYTEST) -m multinode

test-browser: install ## the HTML report in a headless Chromium, where there is one
	@$(PYTEST) -m browser

test-gpu: install ## the tests that need a CUDA device
	@$(PYTEST) -m gpu

lint: install ## ruff (rules and format), mypy, import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "lint: run $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/mypy
	@$(if $(IMPORT_LAYER_TEST),$(PYTEST) $(IMPORT_LAYER_TEST))

format: install ## ruff format, and clang-format where it is installed
	@$(BIN)/ruff format --quiet .
	@if command -v clang-format >/dev/null; then clang-format -i $(CPP_ALL); else echo "format: no clang-format, C++ left alone"; fi

check-cpp: ## clang-format and clang-tidy (both must be installed) find nothing
	@clang-format --dry-run --Werror $(CPP_ALL)
	@clang-tidy --quiet $(CPP_SOURCES) -- -std=c++17 -Icpp/include

audit: install ## licences, a CycloneDX SBOM and, with a network, known vulnerabilities of the pins, into build/
	@$(BIN)/python tools/sbom.py --output build/sbom.cdx.json --licences build/licences.md
	@bash tools/audit.sh $(BIN)/python

DOCS := .venv-docs/bin
docs: .venv-docs/.installed ## the site of docs/ into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --quiet --strict && echo build/site/index.html

.venv-docs/.installed: constraints/docs.txt
	@bash tools/bootstrap.sh .venv-docs "$(PYTHON)" "$(CXX)"
	@$(DOCS)/python -m pip --quiet --disable-pip-version-check install --constraint $< mkdocs-material
	@touch $@

test-cpp: build/cpp/tests-asan build/cpp/tests-tsan ## the C++ tests under ASan + UBSan and under TSan (-j2: side by side)
	@build/cpp/tests-asan
	@build/cpp/tests-tsan

build/cpp/tests-asan: SANITIZE := address,undefined
build/cpp/tests-tsan: SANITIZE := thread
build/cpp/tests-%: $(CPP_SOURCES) $(CPP_HEADERS) $(CPP_TESTS) build/cpp/doctest.o
	@$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Wpedantic -Werror -ffp-contract=off -fno-omit-frame-pointer \
	  -fsanitize=$(SANITIZE) -fno-sanitize-recover=all -Icpp/include -Icpp/third_party $(CPP_SOURCES) $(CPP_TESTS) \
	  build/cpp/doctest.o -pthread -o $@

# doctest's own code, most of the time of a build: once for both, without sanitizers and without -O
build/cpp/doctest.o: cpp/tests/main.cpp cpp/third_party/doctest/doctest.h
	@mkdir -p $(@D)
	@$(CXX) -std=c++17 -Icpp/third_party -c $< -o $@

wheel: install ## wheel and sdist in dist/
	@mkdir -p build
	@$(BIN)/python -m build --outdir dist . >build/wheel.log 2>&1 || { tail -n 20 build/wheel.log >&2; exit 1; }
	@ls dist

clean: ## remove what was built (not .venv, not runs/)
	@rm -rf build dist ./*.egg-info aer_megatron/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@rm -f $(STAMP)
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
