"""Triton kernels: importing only triton, so that other builds of it can load them too."""
