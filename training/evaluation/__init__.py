"""Evaluation: how close a generator's pictures are to the real ones, and whether they show what the prompt says.

`features` sees pictures as a network does, `metrics` compares sets of features, `reference` keeps those of the real
pictures, `split` opens all that generated ones are compared with, `evaluate` runs a generator over its captions,
`model` does so for a model directory, and `sheet` shows a dozen results.
"""
