# Every target below installs what it needs into .venv by itself.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
# Threads that wait asleep: on cores shared with other work, spinning ones took twice as long.
DEMO := OMP_WAIT_POLICY=passive $(BIN)/maha train recipes/demo.yaml --overwrite
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.PHONY: help install demo report test slow kills gpu check format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## Make the virtual environment .venv

demo: $(STAMP)  ## Train a small language model on two novels (a few minutes on two cores)
	$(DEMO)

report: $(STAMP)  ## Turn the committed results into results/paper/report.md, and report.html beside it
	$(BIN)/maha report

test: $(STAMP)  ## Run the tests, less the slow ones
	$(PYTEST)

slow: $(STAMP)  ## Run the slow tests
	$(PYTEST) -m slow

kills: $(STAMP)  ## Kill training two hundred times and resume it
	OMP_NUM_THREADS=1 $(BIN)/python tests/training/kill_often.py 200 results/kills.json

gpu: $(STAMP)  ## On a GPU: its tests, then the benchmarks, into runs/gpu (about ten minutes)
	mkdir -p runs/gpu
	$(BIN)/maha bench first_call --output runs/gpu/bench-first-call.json
	$(BIN)/pytest -n 6 --dist worksteal tests/gpu --gpu-results runs/gpu/gpu-tests.json
	$(BIN)/maha bench layer --output runs/gpu/bench-layer.json
	$(BIN)/maha bench ops --output runs/gpu/bench-ops.json
	$(BIN)/maha bench decode --output runs/gpu/bench-decode.json
	$(BIN)/python -m maha_attn.bench.fusion --output runs/gpu/bench-fusion.json

check: $(STAMP)  ## Lint, check types and imports, run the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(PYTEST) -q

format: $(STAMP)  ## Let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove the virtual environment and every run
	rm -rf $(VENV) runs dist

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "maha-attn needs Python 3.11, 3.12 or 3.13; found: $$(python3 --version 2>&1)." >&2; \
		echo "Install one of them, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments;" >&2; \
		echo "on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
