"""Changes to a traced graph, one file each. They know graphs of tensor operations, and neither programs nor calls."""
