"""The trainer around kd_kernels: data, models, caches, methods, evaluation. Only this package imports transformers."""
