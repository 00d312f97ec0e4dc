"""The tvm backend. Importing this package imports no TVM."""

from dsc.backends.tvm.backend import TvmBackend

__all__ = ["TvmBackend"]
