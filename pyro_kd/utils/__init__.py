"""What every room may use: tensors in nested objects, random states, tables, names of programs. Knows nothing of distillation."""
