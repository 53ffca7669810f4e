"""Evaluation: how close a generator's pictures are to the real ones, and whether they show what the prompt says.

`features` sees pictures as a network does, `metrics` compares sets of features, `reference` keeps those of the real
pictures, `evaluate` runs a generator over the captions of a data set, and `sheet` shows a dozen results.
"""
