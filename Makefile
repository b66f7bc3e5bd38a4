# One-word tasks; each sets up what it needs. `make` alone lists them.
#   PYTHON   the Python to build on (default python3); if it has torch 2.11 to 2.15, that torch is used and left alone
#   CXX      the C++ compiler; without one the package works on plain PyTorch
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
CSRC   := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
FAMILY ?= vq
OUT    ?= runs/gpu-check

ifneq ($(origin CXX),default)
export CXX
endif
COMPILER := $(if $(filter default,$(origin CXX)),c++,$(firstword $(CXX)))
HAS_COMPILER := $(shell command -v $(COMPILER))
# Where there is a compiler, C++ that does not build is an error, not a slow package.
BUILD := $(if $(HAS_COMPILER),MMGEN_KERNELS_BUILD=1,MMGEN_KERNELS_BUILD=auto)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all bench bench-micro gpu-check sanitize wheel check lint clean python

help:  ## print this list
	@echo "Tasks, each of which sets up what it needs:"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## ?/\1\t/' | expand -t 14 | sed 's/^/  /'

demo: $(STAMPS)/cpp $(STAMPS)/extra-mmgen  ## a VQ-VAE of photographs, stock quantizer against ours; then a DiT of digits
	$(PY) -m mmgen demo $(ARGS)

test: $(STAMPS)/probe $(STAMPS)/extra-test $(STAMPS)/extra-mmgen $(STAMPS)/extra-lint  ## everything that takes seconds and no GPU, then lint
	$(PY) -m pytest -m "not long and not gpu" $(ARGS)
	@$(MAKE) --no-print-directory lint

test-all: $(STAMPS)/probe $(STAMPS)/extra-test $(STAMPS)/extra-mmgen $(STAMPS)/extra-bench $(STAMPS)/extra-lint  ## the long tests too
	$(PY) -m pytest $(ARGS)
	@$(MAKE) --no-print-directory lint

lint: $(STAMPS)/package $(STAMPS)/extra-lint  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

check: $(STAMPS)/cpp  ## the correctness cases that run anywhere
	$(PY) -m mmgen_kernels.cli info
	$(PY) -m mmgen_kernels.cli check

bench: $(STAMPS)/probe $(STAMPS)/extra-bench  ## FAMILY=vq: the races of a family against its rivals
	$(PY) -m benchmarks $(FAMILY) $(ARGS)

bench-micro: $(STAMPS)/probe $(STAMPS)/extra-bench  ## one small measurement per public operator
	$(PY) -m pytest benchmarks/micro --benchmark-only $(ARGS)

gpu-check: $(STAMPS)/probe $(STAMPS)/extra-test  ## FAMILY=vq OUT=dir WHEELS=dir: tests, checks, short races on this GPU, as JSON
	$(PY) tools/gpu_check.py $(FAMILY) --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

sanitize: $(STAMPS)/cpp $(STAMPS)/extra-test  ## the C++ under AddressSanitizer and UBSan: the battery, or ARGS="tests/vq -k heads"
	$(PY) tools/sanitize.py $(ARGS)

wheel: $(STAMPS)/package $(STAMPS)/extra-test  ## dist/*.whl, tested against the oldest torch and ours (gigabytes, minutes)
	$(PY) tools/build_wheel.py dist
	$(PY) -m pytest tests/packaging/test_wheel.py -m "long or not long" --wheel-folder dist $(ARGS)

clean:  ## remove everything that was built, .venv included
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f mmgen_kernels/*.so mmgen_kernels/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the environment: a stamp per step, touched when the step is whole --------------------------------------------------

python:
	@command -v $(PYTHON) >/dev/null || { echo "no Python: '$(PYTHON)' was not found; make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1); make PYTHON=/path/to/python3"; exit 1; }

$(STAMPS)/venv: | python
	$(PYTHON) tools/environment.py create
	@mkdir -p $(@D) && touch $@

$(STAMPS)/package: $(STAMPS)/venv setup.py pyproject.toml
	@$(if $(HAS_COMPILER),,echo "no C++ compiler ('$(COMPILER)'): CPU tensors will be served by plain PyTorch";)
	$(BUILD) $(PY) tools/environment.py package
	@touch $@

$(STAMPS)/cpp: $(STAMPS)/package $(CSRC)
	$(BUILD) $(PY) setup.py -q build_ext --inplace
	@touch $@

# the extension that tests and benchmarks look through; pybind11 comes with the test requirements
$(STAMPS)/probe: $(STAMPS)/cpp $(STAMPS)/extra-test
	MMGEN_KERNELS_PROBE=1 $(BUILD) $(PY) setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/extra-%: $(STAMPS)/package
	$(PY) tools/environment.py extra $*
	@touch $@
