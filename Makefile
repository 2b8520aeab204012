# Each target does its own set-up: an own .venv with the pinned versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
OUT ?= out/demo
LABELS ?= red cross; orange square; striped square; yellow star; cyan hoop; cyan square; cyan arrow; blue stick; purple square; purple stick; lawn, meadow; masonry; sky

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test bench lint format clean

help:
	@echo "make demo    cut the shipped pictures into words: LABELS='red disc; lawn, grass' OUT=out/demo"
	@echo "make test    the whole test suite"
	@echo "make bench   how fast it is, beside its rivals: BENCH='--preset quick' (20 minutes and more without)"
	@echo "make lint    ruff: lint and format check"
	@echo "make format  ruff: fix and format"
	@echo "make clean   remove .venv and caches"

$(VENV)/.inference: setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.inference
	@echo "Adding what the tests need"
	@$(PIP) -e ".[test]"
	@$(BIN)/python -m tests.published_suites > /dev/null
	@touch $@

demo: $(VENV)/.inference
	@echo "Cutting the pictures in examples/ into: $(LABELS)"
	@$(BIN)/gkc segment examples --labels "$(LABELS)" --out "$(OUT)"
	@echo "Look at the overlays above, and change the words: make demo LABELS='striped square; meadow; sky'"

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.test
	@command -v $${CXX:-g++} > /dev/null || echo "No C++ compiler: what needs torch.compile is left out"
	@$(BIN)/python -m benchmarks $(BENCH)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
