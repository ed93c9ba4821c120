"""Links: what agents share by other ways than a graph's edges; see `links.link`."""
