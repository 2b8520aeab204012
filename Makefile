# Each target sets up .venv with the pinned versions of constraints.txt.
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
	@echo "make demo    segment the images in examples/: LABELS='red disc; lawn, grass' OUT=out/demo"
	@echo "make test    run the test suite"
	@echo "make bench   measure the speed against other models: BENCH='--preset quick' (20 minutes without)"
	@echo "make lint    run ruff's linter and format check"
	@echo "make format  fix and format with ruff"
	@echo "make clean   remove .venv and caches"

$(VENV)/.inference: setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.inference
	@echo "Installing the test dependencies"
	@$(PIP) -e ".[test]"
	@$(BIN)/python -m tests.published_suites > /dev/null
	@touch $@

demo: $(VENV)/.inference
	@echo "Segmenting the images in examples/ with the words: $(LABELS)"
	@$(BIN)/gkc segment examples --labels "$(LABELS)" --out "$(OUT)"
	@echo "Open the overlays above. Try other words: make demo LABELS='striped square; meadow; sky'"

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.test
	@command -v $${CXX:-g++} > /dev/null || echo "No C++ compiler found: measurements with torch.compile are skipped"
	@$(BIN)/python -m benchmarks $(BENCH)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
