"""Lossless drafting: sparse steps draft, a dense step verifies, one noise decides for both.

`algorithm` makes it known to SGLang, `worker` runs the cycles, `sampling` and `sampler` draw the
tokens, `cpu_backend` attends.
"""
