PYTHON ?= python3
VENV ?= .venv
RUN ?= demo
INSTALLED = $(VENV)/.installed

.PHONY: demo test notebooks install

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable ".[notebooks,test]"
	touch $@

# Notebooks 01 to 04 on the Shapes world; an interrupted demo goes on where it stopped.
demo: $(INSTALLED)
	$(VENV)/bin/clipgen run --preset laptop --run $(RUN)

test: $(INSTALLED)
	rm -rf results/smoke results/smoke-clip  # notebooks run from the beginning
	CLIPGEN_PROGRESS=0 $(VENV)/bin/python -m pytest tests
	CLIPGEN_PROGRESS=0 $(VENV)/bin/python -m pytest -p no:cacheprovider --nbval notebooks --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 300

# Execute the saved notebooks again, at preset smoke, and keep their outputs.
notebooks: $(INSTALLED)
	rm -rf results/smoke results/smoke-clip
	CLIPGEN_PROGRESS=0 $(VENV)/bin/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb
	$(VENV)/bin/python -c "import nbformat, pathlib, clipgen_lib.cli as c; [nbformat.write(c.tidied(nbformat.read(p, 4)), p) for p in pathlib.Path('notebooks').glob('*.ipynb')]"
