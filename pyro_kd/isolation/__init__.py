"""Whose parameters are whose: frozen teachers, and the tensors, modules and generators that a program reaches."""
