"""Figures of the chip these kernels are for (CUDA C++ Programming Guide; NVIDIA H100 datasheet)."""

SHARED_BYTES = 227 * 1024  # of shared memory that a CTA may have
MULTIPROCESSORS = 132  # of an H100 or H200; how the work is cut and ordered depends on it
