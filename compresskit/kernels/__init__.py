"""Loss kernels, one folder per op.

Each holds the definition (`reference`), a memory-bounded form (`chunked`), a GPU form (`triton`).
"""
