"""`make bench`: ours and what people run instead, in turn, in fresh processes; `__main__.py` is where to begin."""
