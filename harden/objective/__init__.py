"""Loss terms, and what they share.

A term is a small function of a model and some rows; the training loop weighs and adds them.
"""
