"""Kernels: fused GPU operations, each with its torch reference."""

if __name__ == "kernels":
    raise ImportError(
        "import fewstep.kernels, not the bare folder kernels: run python with -P, or from another directory"
    )
