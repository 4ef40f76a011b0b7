# Every target sets up .venv by itself. Settings follow the target:
#   make train model=small optim.lr=2e-3 data.target_lang=fr
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEER := .venv/.bench
TARGETS := help setup data train eval translate bench test lint format tensorboard clean
.PHONY: $(TARGETS)

# A word that is no target ("make train small") is refused now, not after the training.
$(foreach word,$(filter-out $(TARGETS) $(READY) $(PEER),$(MAKECMDGOALS)),\
    $(error There is no target "$(word)"; targets are $(TARGETS), settings have the form name=value))

# The settings given on the command line, each as one shell word: 'name=value'. $(value) keeps
# make, the single quotes keep the shell from reading anything into them. Unexported, or make
# would expand them for the environment. $(MAKEOVERRIDES) would do none of this.
OWN := ARGS BIN MAKE% NPROC OWN PEER PYTHON READY SETTINGS SHELL TARGETS TEXT .SHELLFLAGS
NAMES := $(sort $(foreach name,$(filter-out $(OWN),$(.VARIABLES)),\
    $(if $(filter command,$(origin $(name))),$(name))))
define newline


endef
quote = '$(subst $(newline), ,$(subst ','\'',$(1)))'
SETTINGS = $(foreach name,$(NAMES),$(call quote,$(name)=$(value $(name))))
no_settings = $(if $(NAMES),$(error make $@ takes no settings, but got $(NAMES); options go into ARGS='...'))
ifneq ($(NAMES),)
unexport $(NAMES)
endif
unexport ARGS TEXT

help: ## Show this list
	@echo 'make TARGET [group=choice] [group.setting=value] [ARGS="..."]'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## Create .venv with everything needed (the other targets do this by themselves)
	@$(no_settings)echo '.venv is ready'

data: $(READY) ## Fetch and prepare the corpus without training
	@$(BIN)/python scripts/prepare.py $(SETTINGS) $(value ARGS)

# NPROC processes, where it is given: a number, or gpu for as many as there are GPUs.
train: $(READY) ## Train a model, or continue an unfinished run of the same settings
	@$(BIN)/python $(if $(filter command,$(origin NPROC)),$(if $(filter-out 1,$(value NPROC)),\
	    scripts/launch.py --standalone --nproc-per-node $(call quote,$(value NPROC)))) \
	    scripts/train.py $(SETTINGS) $(value ARGS)

eval: $(READY) ## Score a model: BLEU and chrF of the last run, or of eval.model=...
	@$(BIN)/python scripts/evaluate.py $(SETTINGS) $(value ARGS)

translate: $(READY) ## Translate TEXT="...", or standard input line by line
	@$(no_settings)$(BIN)/python scripts/translate.py $(value ARGS) \
	    $(if $(value TEXT),-- $(call quote,$(value TEXT)))

bench: $(PEER) ## Measure speed, beside a peer: ARGS='train --peer hf', ARGS=--help for more
	@$(BIN)/python scripts/bench.py $(value ARGS) $(SETTINGS)

test: $(READY) ## Run all tests; the quick ones only: ARGS='-m "not slow"'
	@$(no_settings)$(BIN)/python -m pytest $(value ARGS)

lint: $(READY) ## Check style and types
	@$(no_settings)$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## Put the code into the one style
	@$(no_settings)$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

tensorboard: $(READY) ## Show the curves of all runs in the browser
	@$(no_settings)$(BIN)/tensorboard --logdir runs $(value ARGS)

clean: ## Remove .venv and caches; runs/ (models) and data/ (downloads) stay
	@$(no_settings)rm -rf .venv build multirun outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find mt scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# .ready is the last thing written, .started the first: a setup that was cut off starts anew.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'error: Python 3.11 or newer is needed; name one: make setup PYTHON=python3.12' >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo 'error: this Python has no venv module (on Debian and Ubuntu it is in the package' \
	    'python3-venv); name another one: make setup PYTHON=/path/to/python3' >&2; exit 1; }
	@if [ -e .venv/.started ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.started && rm -f $@
	@echo 'Setting up .venv (the first time this downloads PyTorch and takes some minutes)' >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm .venv/.started && touch $@

# The peer of the benchmarks is no part of the app, and installed when it is first compared with.
$(PEER): $(READY)
	@echo 'Installing what the benchmarks compare with' >&2
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@
