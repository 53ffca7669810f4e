"""Training: data, methods, trainer and evaluation."""

if __name__ == "training":
    raise ImportError(
        "import fewstep.training, not the bare folder training: run python with -P, or from another directory"
    )
