"""Runtime: schedules, denoisers, samplers, engines and the `Pipeline` that generates."""

if __name__ == "runtime":
    raise ImportError("import fewstep.runtime, not the bare folder runtime: run python with -P, or from another directory")
