# The interpreter to use: make test PYTHON=python3.12
PYTHON = python3

run:
	$(PYTHON) mailserver.py

test:
	$(PYTHON) test_mailserver.py

.PHONY: run test
