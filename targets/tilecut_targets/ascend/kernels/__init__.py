"""Triton kernels for Ascend: each file imports only triton, and is shipped with the artifacts that use it."""
