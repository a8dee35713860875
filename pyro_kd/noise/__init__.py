"""Draws as functions of shared noise, z = g(Pa(z), eps): record the eps of one program and replay it in another.

From the inside out: laws of noise, a tape under torch's random operations, a sampler for each family, and the two handlers.
This room knows tensors, distributions and sites. It does not know pairs of programs.
"""
