"""Image datasets in every layout that trainers read, as batches of NumPy arrays."""
