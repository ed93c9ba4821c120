"""A parameter server: the last rank of a job. Begin with `server`, then `client` and `rules`."""
