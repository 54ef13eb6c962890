"""Triton kernels of avadclip_fast, one file per op."""

if __name__ != "avadclip_fast.kernels":
    raise ImportError(f"import these kernels as avadclip_fast.kernels, not as {__name__!r}")
