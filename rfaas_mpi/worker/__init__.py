"""The process that runs kernels for one lease."""
