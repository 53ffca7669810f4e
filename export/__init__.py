"""Export: a student becomes an engine, and is refused when its images differ."""

if __name__ == "export":
    raise ImportError(
        "import fewstep.export, not the bare folder export: run python with -P, or from another directory"
    )
