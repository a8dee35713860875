"""Changes to a traced graph, one file each. They know graphs of tensor operations, but neither programs nor calls."""
