"""The run-time check of shapes and types, as the import hook in conftest.py wants it: a decorator that can be imported."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is good enough where a float is asked for
