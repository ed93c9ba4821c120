"""Hosts joined by slow links: `run.sh`."""
