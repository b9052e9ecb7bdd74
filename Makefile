# What contributors type. Each line also works without make.
.PHONY: install lint test fast slow bench docs

install:  ## everything that tests need
	pip install -e '.[test]'

lint:  ## style and types
	ruff check .
	ruff format --check .
	pyright

test:  ## the whole suite, two processes
	pytest -n 2 --dist worksteal

fast:  ## what needs no cluster, no browser and no server: a minute
	pytest tests/test_architecture.py tests/test_config.py tests/test_optim.py tests/test_models.py tests/test_layers.py

slow:  ## longer proofs
	pytest -m slow -n 2 --dist worksteal --ignore tests/test_cli.py
	pytest -m slow tests/test_cli.py

bench:  ## ours and peers in turns; PHOTOS is a folder of JPEGs
	python benchmarks/all.py $(PHOTOS) --json scoreboard.json

docs:  ## the site, in site/
	mkdocs build --strict
