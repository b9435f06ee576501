# make demo   trains and tries a small Vim on handwritten digits, into runs/demo/
# make demo-dense   the same for segmentation and detection, with OpenMMLab: digits in scenes, into runs/demo-dense/
# make demo-points   the same for point clouds: digits as clouds, into runs/demo-points/
# make demo-pixels   trains small networks that denoise and enlarge photographs, into runs/demo-pixels/
# make test   runs the whole test suite, OpenMMLab included (its first time on a machine compiles mmcv: ten minutes)
# All make the virtual environment .venv first, where it is not there. Nothing but Python 3.10+ is needed.

PYTHON ?= python3
BIN := .venv/bin
PYTEST ?= $(BIN)/python -m pytest -n auto --maxprocesses=8

.PHONY: demo demo-dense demo-points demo-pixels test test-core lint docs cases models pictures clean

demo: .venv/installed
	$(BIN)/linescan demo

demo-dense: .venv/openmmlab
	$(BIN)/linescan demo --dense

demo-points: .venv/installed
	$(BIN)/linescan demo --points

demo-pixels: .venv/installed
	$(BIN)/linescan demo --pixels

test: .venv/openmmlab
	OMP_NUM_THREADS=1 $(PYTEST)

# Everything that is quick and needs no OpenMMLab: for the minutes between two edits.
test-core: .venv/installed
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow and not openmmlab"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as a site: build/docs/index.html. Any warning is an error.
docs: .venv/docs
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs
	@echo build/docs/index.html

# Tables made from the code: the parity cases of all families in one file, and docs/models.md.
cases:
	cat tests/parity/cases/*.toml > tests/parity/cases.toml

models: .venv/installed
	$(BIN)/python tools/models.py

# The images of routes in README.md and docs/routes.md.
pictures: .venv/installed
	$(BIN)/python tools/pictures.py

clean:
	rm -rf .venv build dist docs/api *.egg-info

.venv/installed: pyproject.toml constraints.txt $(wildcard setup.py linescan/scans/kernels/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "linescan needs Python 3.10 or newer, this is " \
		+ sys.version.split()[0] + "; try: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@

.venv/docs: .venv/installed
	$(BIN)/pip install -c constraints.txt -e '.[docs]'
	@touch $@

.venv/openmmlab: .venv/installed tools/install_openmmlab.py
	$(BIN)/python tools/install_openmmlab.py
	@touch $@
