# make demo   trains a VAE on real images and writes runs/demo
# make test   runs every test, slow ones too
# Each makes .venv if there is none. Another Python: make PYTHON=python3.12 test

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
PROCESSES ?= 2
SPREAD := --numprocesses $(PROCESSES) --dist worksteal

.PHONY: demo test test-device lint tutorials bench gpu peers audit clean

.venv/installed: pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "pvae needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/pvae train --out runs/demo --overwrite

test: .venv/installed
	$(BIN)/pytest --quiet $(SPREAD)

# On a GPU, or the pretend one of tests/pretend; then the CPU's tests as on a machine with a GPU.
test-device: .venv/installed
	$(BIN)/python -m tests.pretend cuda -m pytest --quiet --device cuda $(SPREAD)
	$(BIN)/python -m tests.pretend cuda -m pytest --quiet $(SPREAD)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pvae tests benchmarks conftest.py

# Runs the tutorials and writes their outputs into the notebooks.
tutorials: .venv/installed
	$(BIN)/jupytext --sync tutorials/*.py
	$(BIN)/jupyter-execute --inplace tutorials/*.ipynb

# Real data, about an hour and a half on one core; PVAE_DATA names the folder with MNIST.
bench: .venv/installed
	$(BIN)/python benchmarks/quality.py a b c d

# What a first half hour with a GPU runs; benchmarks/gpu.py --help says how to run it without one.
gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py

# The libraries that benchmarks/throughput.py measures beside pvae, in an environment of their own.
peers: .venv-peers/installed

.venv-peers/installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	echo '*' > .venv-peers/.gitignore
	.venv-peers/bin/pip install --quiet --requirement $<
	touch $@

# Whether versions of the lock have known vulnerabilities; asks a database on the network.
audit: .venv-audit/installed
	.venv-audit/bin/pip-audit --requirement constraints-dev.txt --no-deps --disable-pip

.venv-audit/installed:
	$(PYTHON) -m venv .venv-audit
	echo '*' > .venv-audit/.gitignore
	.venv-audit/bin/pip install --quiet pip-audit
	touch $@

clean:
	rm -rf .venv .venv-peers .venv-audit runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
