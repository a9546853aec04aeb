"""One script per topic: `python -m experiments.NAME --help`."""
