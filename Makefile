# The interpreter to use: make test PYTHON=python3.12
PYTHON = python3

run:
	$(PYTHON) mailserver.py

test:
	$(PYTHON) test_mailserver.py

# A certificate that nobody vouches for, to try --tls cert.pem key.pem in class
cert:
	openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj /CN=localhost \
		-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem

.PHONY: run test cert
