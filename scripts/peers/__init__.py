"""The peers' own code paths on fake tensors: what scripts/published.py measures the planner against."""
