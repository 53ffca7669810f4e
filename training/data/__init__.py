"""Captioned pictures for training: two data sets that are built here, and folders of your own.

`emoji` and `fashion` build Hugging Face image folders, `sources` lists the pictures of any folder or set of WebDataset
shards, and `packed` turns them into the one tensor that training reads.
"""
