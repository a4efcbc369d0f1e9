"""A checkpoint that answers over HTTP, on Ray Serve."""
