# Two commands do everything: `make demo` and `make test`. Both make their own virtual environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# threads that spin for long while waiting stall for whole time slices when a neighbour takes a core (docs/log.md)
export GOMP_SPINCOUNT ?= 1000
# the release everything is measured with; pinned before the package, so that its open range never pulls another build
TORCH := torch==2.13.0

# most modules of the packages are never imported: Python compiles those that are, when they are
PIP := --quiet --disable-pip-version-check --no-compile
# and keeps them: without, every process that the tests and demos start compiles all of torch again, for seconds
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-train programs clients lint format docs test test-slow test-isa check-arm sanitize bench clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# what the native kernels are built from: a change builds them again
NATIVE := CMakeLists.txt $(wildcard csrc/*)

define install
	$(PYTHON) -c 'import sys; sys.exit("MoE-DR needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP) '$(TORCH)' numpy
	$(BIN)/python -m pip install $(PIP) '$(TORCH)' -e '$(1)'
endef

$(VENV)/.core: pyproject.toml $(NATIVE)
	$(call install,.)
	touch $@

$(VENV)/.test: pyproject.toml $(NATIVE)
	$(call install,.[test])
	touch $(VENV)/.core $@

demo: $(VENV)/.core  ## a ready assistant: fetch it, ask it, tune one of its experts, serve it (under 5 minutes)
	$(BIN)/python examples/demo.py

demo-train: $(VENV)/.core  ## train `nano` on Python's own library, draw its experts, serve it (under 5 minutes)
	$(BIN)/python examples/demo_train.py

programs:  ## Debian's Chromium and Prometheus, for the tests that drive them (as root; without, these are skipped)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium prometheus >/dev/null

$(VENV)/clients/.done: tests/clients/requirements.txt tests/clients/package.json
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install $(PIP) -r tests/clients/requirements.txt
	mkdir -p $(VENV)/clients/node
	cp tests/clients/package.json $(VENV)/clients/node/
	cd $(VENV)/clients/node && npm install --silent --no-audit --no-fund
	touch $@

clients: $(VENV)/.test $(VENV)/clients/.done  ## a table of clients that others wrote, each case with its result (needs node and npm)
	$(BIN)/python -m tests.clients.test_clients

lint: $(VENV)/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.format: $(VENV)/.test .pre-commit-config.yaml
	$(BIN)/python -m pip install $(PIP) $(shell grep -o 'clang-format==[0-9.]*' .pre-commit-config.yaml)
	touch $@

format: $(VENV)/.format  ## what ruff mends in the Python code, clang-format in the C++ code
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/*.h tests/native/*.cpp)

$(VENV)/.docs: $(VENV)/.core
	$(BIN)/python -m pip install $(PIP) -e '.[docs]'
	touch $@

docs: $(VENV)/.docs  ## the documentation as a site in build/docs; a warning is an error
	$(BIN)/mkdocs build --strict

test: lint  ## lint, types and the tests
	$(BIN)/python -m pytest -m 'not slow' -n auto --dist worksteal

test-slow: $(VENV)/.test  ## the proofs that take minutes
	$(BIN)/python -m pytest -m slow

test-isa: $(VENV)/.test  ## the tests that depend on the instruction set, as on other machines (SHORT=1: what CI runs)
	$(BIN)/python -m tests.helpers.isa $(if $(SHORT),--short)

check-arm:  ## the native kernels and their test for 64-bit Arm (needs Debian's g++-aarch64-linux-gnu; to run them, qemu-user-static)
	mkdir -p build/arm
	aarch64-linux-gnu-g++ -std=c++17 -O1 -static -pthread -ffp-contract=off -Wall -Wextra -Wno-psabi -Wno-unused-function \
	  $(addprefix tests/native/,kernels_test.cpp coding_test.cpp training_test.cpp) $(filter-out csrc/bind.cpp,$(wildcard csrc/*.cpp)) -o build/arm/kernels_test
	if command -v qemu-aarch64-static; then qemu-aarch64-static build/arm/kernels_test; else echo 'compiled, not run: needs qemu-user-static'; fi

sanitize:  ## the native kernels under the address, undefined-behaviour and thread sanitizers (needs cmake)
	cmake -S . -B build/sanitize -DDEEPSEEK_SANITIZE=ON
	cmake --build build/sanitize --parallel
	build/sanitize/kernels_test
	DEEPSEEK_ISA=scalar build/sanitize/kernels_test
	build/sanitize/pool_test

bench: $(VENV)/.test  ## every figure of docs/benchmarks.md, measured here (several hours; benchmarks/fetch_data.py first)
	$(BIN)/python examples/demo_train.py </dev/null
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/balance.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/full_size.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/tune.py
	$(BIN)/python benchmarks/named.py
	$(BIN)/python benchmarks/law.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/residency.py
	$(BIN)/python benchmarks/serving.py

clean:  ## remove what the build made (not what you trained)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
