"""Values over the graph's edges: begin with `opening`, then `exchange` and `transport`."""
