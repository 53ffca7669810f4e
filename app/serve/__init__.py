"""Serving: an image API that stays up. Only `fewstep serve` imports what is here, so its libraries are an extra.

A request's path: `images.py` or `live.py` checks it and makes jobs, an image each; `jobs.py` holds them, `service.py`
takes them in batches to a `worker.py`, a process with the model; `pictures.py` makes PNGs of what comes back.
"""
