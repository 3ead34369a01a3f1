"""The run-time check of shapes and types, a decorator that the import hook in tests/conftest.py can import."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is good enough where a float is asked for
