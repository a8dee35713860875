"""Pyro programs of third parties, distilled as they are: `python -m tests.third_party` says how to install and run them."""
