"""`lim trace`: what the layers of decode steps read, and what other policies would have read."""
