"""Triton kernels, one module per op of the same name in `megarat.ops`, imported when a kernel first runs.

They use plain pointers and no feature of one GPU generation; under TRITON_INTERPRET=1 (set before the first import) the same code
runs on the CPU. Inputs are converted to fp32 right after loading, except operands of `tl.dot`.
"""
