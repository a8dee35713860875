"""Gradients of a loss in many calls, to compare their mean with the truth."""

import torch

__all__ = ["assert_mean", "gradients"]


def gradients(loss, params, count, *args):
    """The gradients of ``count`` calls, of shape (count, number of parameters)."""
    found = []
    for _ in range(count):
        found.append(torch.stack([part.reshape(()) for part in torch.autograd.grad(loss(*args), params)]))
    return torch.stack(found).double()


def assert_mean(values, truth, standard_errors=5):
    """The mean of independent values along the first dimension agrees with the truth within five of its standard errors."""
    values = torch.as_tensor(values).double()
    error = values.std(0) / len(values) ** 0.5
    distance = (values.mean(0) - torch.as_tensor(truth)).abs()
    assert (distance < standard_errors * error).all(), (values.mean(0), truth, error)
