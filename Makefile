# Each target sets up everything it needs on a machine with Python 3.10+ and a C compiler: a virtual environment in .venv with pinned packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Processes that the tests are spread over, a file of them at a time; -n 0 in TESTS runs them in one.
WORKERS ?= 3
export DS_BUILD_OPS := 0

.PHONY: demo test test-slurm test-gpu check bench docs format clean

demo: $(VENV)/.installed
	$(BIN)/megarat demo $(DEMO)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -rfEs -m "not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# A part of the above, skipped there with a reason where no Slurm can be started.
test-slurm: $(VENV)/.installed-test
	$(BIN)/python -m pytest -rfEs -n 2 --dist loadfile tests/slurm $(TESTS)

test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/gpu $(TESTS)

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m megarat.config | diff - docs/config.md

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.run $(BENCH)

docs: $(VENV)/.installed
	$(BIN)/python -m megarat.config > docs/config.md

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A CUDA torch that the system already has is kept: the environment then sees the system's packages and installs no other torch. A CUDA torch
# brings the triton it was built for; only beside a CPU torch is the pinned one installed, for the interpreter tests.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("megarat needs Python 3.10 or newer; this is " + sys.version.split()[0])'
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.version.cuda)' 2>/dev/null; then \
	  echo "keeping the installed CUDA torch"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  echo "installing $(TORCH)"; $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -qq --disable-pip-version-check $(TORCH) 'numpy<2.4'; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch requirements.txt setup.py
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.version.cuda)'; then \
	  grep -v '^triton' requirements.txt > $(VENV)/requirements.txt; else cp requirements.txt $(VENV)/requirements.txt; fi
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
