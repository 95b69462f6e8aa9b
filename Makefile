# Two commands, on a machine with Python >= 3.10 and pip:
#   make demo     trains a small GPT (examples/train_gpt.py), on the GPU where there is one
#   make test     the whole test suite; GPU tests are skipped, with the reason, where there is no GPU
# Both make a virtual environment, install what requirements/ pins, and build the CUDA extension for
# the GPUs of this machine, or skip it where there is none. Further:
#   make build    the CUDA extension, in place (FLASH_ATTN2_ARCHS, FLASH_ATTN2_FILTER: see README.md)
#   make lint     ruff and clang-format, as checks;  make format  applies them
#   make sanitize compute-sanitizer over small calls (memcheck, synccheck, racecheck); on a GPU
#   make fuzz     random problems against plain attention, 10,000 of them; on a GPU
#   make clean    removes what was built;  make distclean  the environment and fetched headers too
#
# Variables:
#   VENV=.venv    where the virtual environment is;  VENV=0: none, nothing is installed, and PYTHON
#                 is used as it is:  make test VENV=0 PYTHON=python3
#   PYTHON=       the interpreter to use (default: the first that is fit; with VENV=0: python3)
#   PYTEST_ARGS=  DEMO_ARGS=  FUZZ_ARGS=   further arguments of pytest, the training example, fuzz
#   SANITIZE_ARGS=--quick   empty: all variants of a call, and more heads

VENV ?= .venv
PYTHON ?=
ifeq ($(VENV),0)
  PY := $(or $(PYTHON),python3)
  READY :=
  CLANG_FORMAT := clang-format
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
  CLANG_FORMAT := $(VENV)/bin/clang-format
endif

CPP_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# For VENV=0, where the package is not installed.
RUN_ENV = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
RUN = $(RUN_ENV) $(PY)

.PHONY: demo test build extension toolkit lint format sanitize fuzz clean distclean

demo: extension
	$(RUN) examples/train_gpt.py --preset demo $(DEMO_ARGS)

test: extension
	$(RUN) -m pytest $(PYTEST_ARGS)

build: $(READY)
	$(PY) setup.py build_ext --inplace

# Builds for the GPUs of this machine; says why not and goes on where it cannot.
extension: $(READY)
	@if $(PY) tools/can_build.py --for-this-gpu; then $(PY) setup.py build_ext --inplace; fi

# nvcc as wheels, for a machine that has none.
toolkit: $(READY)
	$(PY) -m pip install --quiet -r requirements/nvcc.txt

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CPP_SOURCES)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP_SOURCES)

$(VENV)/.ready: requirements/build.txt requirements/run.txt requirements/test.txt requirements/nvcc.txt pyproject.toml
	sh tools/make_venv.sh "$(VENV)" "$(PYTHON)"
	touch $@

SANITIZE_ARGS ?= --quick
SANITIZE = $(RUN_ENV) compute-sanitizer --error-exitcode 1 --tool
SMALL_CALLS = $(PY) tools/sanitize_target.py $(SANITIZE_ARGS)

sanitize: extension
	$(SANITIZE) memcheck $(SMALL_CALLS)
	$(SANITIZE) synccheck $(SMALL_CALLS)
	$(SANITIZE) racecheck $(SMALL_CALLS)

fuzz: extension
	$(RUN) tools/fuzz_kernels.py $(FUZZ_ARGS)

clean:
	rm -rf build dist *.egg-info flash_attn2/_C*.so flash_attn2/_kernel_resources.json

distclean: clean
	rm -rf .venv third_party/cutlass
