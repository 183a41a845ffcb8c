# Thin names for run.py. PYTHON=python3 SETUP=0 uses that interpreter and installs nothing.
PYTHON ?= python3
SETUP ?= 1
export SETUP

demo test test-newest test-llama-cpp lint bench:
	$(PYTHON) run.py $@ $(ARGS)

.PHONY: demo test test-newest test-llama-cpp lint bench
