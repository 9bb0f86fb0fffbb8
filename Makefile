# make demo      a real model, pruned end to end on this machine        (see README.md)
# make test      the whole test suite, from nothing; in a random order: make test ORDER=7
# make test-wheel   the wheel, where nothing else is installed than it asks for
# make install   only the virtual environment

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test test-wheel install clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] < (3, 13) else "Python 3.10, 3.11 or 3.12 is needed (this is %d.%d); name one with: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test]'
	@touch $@

# The arguments are described in scripts/demo.sh: MODEL TEXT TP OUT …
demo: install
	@PYTHON=$(BIN)/python bash scripts/demo.sh

# Files are handed out as they are found, those with long tests first: by their number of tests the longest would come last
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(ORDER),--order $(ORDER))

test-wheel:
	@PYTHON=$(PYTHON) TORCH='$(TORCH)' bash tests/wheel.sh

clean:
	rm -rf $(VENV) demo
