"""The kernel templates: `@triton.jit` functions, one file a family.

Nothing is imported here, because a kernel file imports triton when it is imported, and importing
`dsc.backends.triton` must not. A launch names a kernel as `module:function`; `catalogue.py` says
which parameters of it are pointers, scalars and compile-time constants.

House rules of every kernel file:

- It imports nothing but triton, so that the copy written into an artifact runs by itself.
- Every load and store is masked: any shape is correct, block sizes only decide the speed.
- Operands are given as pointers and *strides in elements*; the innermost dim of a row is
  contiguous unless a stride for it is a parameter.
- Values are widened to fp32 on load and narrowed by the store. `tl.dot` takes its operands in the
  stored dtype (tensor cores), with `input_precision="ieee"` so that fp32 stays fp32.
- Offsets that can pass 2**31 elements (a batch of a cache, an expert of a weight) are int64.
"""
