"""Lossless drafting: so far the sampler that drafts and verification will share."""
