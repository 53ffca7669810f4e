"""Commands: the `fewstep` program and what each of its verbs does."""

if __name__ == "app":
    raise ImportError("import fewstep.app, not the bare folder app: run python with -P, or from another directory")
