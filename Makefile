PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed

.PHONY: demo test install

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable ".[notebooks,test]"
	touch $@

# Notebooks 01 to 04 on the Shapes world; an interrupted demo goes on where it stopped.
demo: $(INSTALLED)
	$(VENV)/bin/clipgen run --preset laptop --run demo

test: $(INSTALLED)
	rm -rf results/smoke results/smoke-clip
	$(VENV)/bin/python -m pytest tests
	$(VENV)/bin/python -m pytest -p no:cacheprovider --nbval notebooks --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 300
