"""Pyro models, one a file. They import pyro and torch, and nothing of pyro_kd."""
