"""Whose parameters are whose: a frozen teacher that nothing moves, and the tensors, modules and generators a program reaches."""
