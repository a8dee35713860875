"""Applications, one question each: ``python -m examples.NAME``."""
