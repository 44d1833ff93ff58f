# Everything runs in .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: demo test test-slow lint docs figures clean

demo: .venv/.installed  ## learn pointmaze-umaze with EDP + IQL: no download, a minute and a half on two cores
	$(VENV)/python algorithms/edp_iql.py --env-id pointmaze-umaze --num-updates 2000

test: .venv/.installed-dev  ## everything but the learning tests that take minutes
	$(VENV)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: .venv/.installed-dev
	$(VENV)/python -m pytest -m slow

lint: .venv/.installed-dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

docs: .venv/.installed-docs  ## the site, in site/: open site/index.html, no network needed
	NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict

figures: .venv/.installed  ## tables and pictures of the docs again, from benchmarks/results/
	$(VENV)/python benchmarks/report.py benchmarks/results/*/

clean:
	rm -rf .venv site

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV)/pip install -q -r requirements.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(VENV)/pip install -q -r requirements-dev.txt
	touch $@

.venv/.installed-docs: requirements-docs.txt
	$(PYTHON) -m venv .venv
	$(VENV)/pip install -q -r requirements-docs.txt
	touch $@
