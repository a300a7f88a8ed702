# `make train` and `make test` set up what they need in .venv, with Python 3.11+ and make.
PYTHON ?= python3
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train train-text test test-slow test-all lint notebooks bench device clean

train: $(VENV)/ready
	$(BIN)/python examples/train.py

train-text: $(VENV)/ready
	$(BIN)/python examples/train.py --task text

# As on another CPU, whose kernels round otherwise: make test CPU=avx2, or CPU=sse.
KERNELS_avx2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
KERNELS_sse := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41

# With bytecode whatever the shell says: ranks and programs would compile every module again.
PYTEST := $(KERNELS_$(CPU)) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(VENV)/ready
	$(PYTEST) -m "not slow"

# What `make test` leaves out: graphs of torch.compile, trainings, whole programs, and further
# cases of what others show. Test by test: two thirds are of one file, which one process would run.
test-slow: $(VENV)/ready
	$(subst loadfile,loadgroup,$(PYTEST)) -m slow

test-all: test test-slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(VENV)/ready
	$(BIN)/python notebooks/execute.py

# About a quarter of an hour on two cores. Other implementations are timed too where they are installed:
#   .venv/bin/pip install --constraint constraints.txt --editable '.[bench]'
bench: $(VENV)/ready
	$(BIN)/python -m benchmarks

# What there is to know of a GPU, in less than nine minutes, with a $(PYTHON) that has torch for it,
# optree and pytest: nothing is installed. DEVICE= takes options, such as DEVICE=--rehearse for a CPU.
device:
	$(PYTHON) -m benchmarks.device $(DEVICE)

# The constraints name the release that this repository is developed on. TORCH= installs another:
#   make test TORCH=torch==2.8.0
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH),$(TORCH),--constraint constraints.txt) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
