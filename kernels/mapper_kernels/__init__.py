"""Numba kernels: NumPy arrays in, NumPy arrays out; this package imports nothing else of the project.

Every kernel is a plain function on typed arrays, also callable from other compiled code:

    gemm        y = x W for weights stored [N, K] or [K, N], one row or many
    norm rope activation attention softmax        the parts of a transformer
    elementwise reduce index conv moe sort        everything else that a graph may hold
    memory      typed views of raw addresses, loads and stores by element type code, atomics
    team        threads that run one compiled program together

Kernels that may be split between threads take `part` and `parts`: they do share number `part` of `parts`.
"""
