"""Numba kernels: NumPy arrays in, NumPy arrays out; this package imports nothing else of the project.

Every kernel is a plain function on typed arrays, also callable from other compiled code:

    linear      y = x W^T for weights in their stored format (`formats`: f32 .. int4); `dot` and `prepare`
                are its inner loops, emitted as vector code (`vec`)
    fused       the steps of decoding: norm + products + residual or gate; rotation + cache + attention
    flash       one query row over a range of cached rows, parts of which merge exactly
    gemm        y = x W in float32 for weights stored [N, K] or [K, N], off the decode path
    norm rope activation attention softmax        the parts of a transformer
    elementwise reduce index conv moe sort        everything else that a graph may hold
    memory      typed views of raw addresses, loads and stores by element type code, atomics
    api         the NumPy front: products, attention, largest logits as functions on arrays

Kernels that may be split between threads take `part` and `parts`: they do share number `part` of `parts`.
"""
