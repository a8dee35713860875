"""Inputs for programs with two features."""

import torch

X = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]])
