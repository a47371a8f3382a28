# `make fuse` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: fuse test check benchmarks clean

fuse: $(VENV)/installed
	$(RUN) fuse.py

test: $(VENV)/installed
	$(RUN) -m ruff check --quiet . && $(RUN) -m ruff format --check --quiet .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadscope

benchmarks: $(VENV)/installed
	for script in benchmarks/*.py; do $(RUN) $$script || exit 1; done

# On Linux PyPI's torch brings CUDA: for a CPU-only machine set TORCH_INDEX=https://download.pytorch.org/whl/cpu
$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(RUN) -m pip install --quiet -e '.[test,sweep]'
	touch $@

clean:
	rm -rf $(VENV) outputs multirun
