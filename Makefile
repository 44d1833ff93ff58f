# Everything runs in .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: demo test test-slow verify lint docs figures clean

demo: .venv/requirements.installed  ## learn pointmaze-umaze with EDP + IQL: no download, two to three minutes on two cores
	$(VENV)/python algorithms/edp_iql.py --num-updates 2000 --eval-every 200 --eval-episodes 20

test: .venv/requirements-dev.installed  ## everything but the learning tests that take minutes
	$(VENV)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: .venv/requirements-dev.installed
	$(VENV)/python -m pytest -m slow

verify: .venv/requirements.installed  ## act with each trained policy of policies/, beside its card: two minutes
	$(VENV)/python benchmarks/cards.py verify

lint: .venv/requirements-dev.installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

docs: .venv/requirements-docs.installed  ## the site, in site/: open site/index.html, no network needed
	NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict

figures: .venv/requirements.installed  ## tables and pictures of the docs again, from benchmarks/results/
	$(VENV)/python benchmarks/report.py $(dir $(wildcard benchmarks/results/*/runs.json))
	$(VENV)/python benchmarks/results_page.py

clean:
	rm -rf .venv site

.venv/requirements-dev.installed: requirements.txt requirements-docs.txt  # which it includes

.venv/%.installed: %.txt | $(VENV)/pip
	$(VENV)/pip install -q -r $<
	touch $@

$(VENV)/pip:
	$(PYTHON) -m venv .venv
