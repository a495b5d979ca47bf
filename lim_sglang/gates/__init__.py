"""Block gates of SeerAttention-R (arXiv 2506.08889): their files, and how one is trained."""
