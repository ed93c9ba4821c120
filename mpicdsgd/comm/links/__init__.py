"""What agents share by other ways than a graph's edges: begin with `assembly`."""
