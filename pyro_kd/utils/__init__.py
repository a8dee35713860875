"""Tools for every room: tensors in nested objects, random states, tables, names of programs. Knows nothing of distillation."""
