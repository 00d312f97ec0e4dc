"""Triton: kernels for NVIDIA and AMD GPUs, compiled ahead of time with no GPU present.

Importing this package imports neither triton nor a driver. How a program becomes an artifact:

    lower/       each operator to launches of kernels, views without copies; regions.py says which
                 kernel is generated for a region, or for an operator that is one alone
    rows.py      the generator for operators along rows and chains of elements, epilogue.py for
                 what follows a GEMM on its tiles; pointwise.py has the formulas of both
    kernels/     the templates of all else: products, attention, experts, lookups and scans
    blocks.py    block sizes by target, the interpreter's among them
    compile.py   launches' kernels to cubin and hsaco, in a process of its own
    schedule.py  launches to addresses and grids, once the shapes of a call are known
    client.py    runs them in Triton's interpreter (any machine), cuda.py on a GPU
"""

from dsc.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
