"""The sites of two traces: which of them count, which belong together, and whether their distributions can be compared."""
