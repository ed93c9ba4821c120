"""``mpicdsgd submit``."""

from __future__ import annotations

import argparse
from pathlib import Path


def submit(arguments: argparse.Namespace) -> int:
    from mpicdsgd.cli import slurm_script

    site = Path(arguments.site) if arguments.site else slurm_script.default_site()
    request = slurm_script.Request(
        nodes=arguments.nodes,
        time=arguments.time,
        ranks_per_node=arguments.ranks_per_node,
        gpus_per_node=arguments.gpus_per_node,
        stop_before_s=arguments.stop_before,
        site=site,
        options=tuple(arguments.sbatch),
    )
    run_dir, text = slurm_script.script(Path(arguments.config), arguments.overrides, request)
    print(text, end="")
    if not arguments.dry_run:
        print(slurm_script.submit(run_dir, text, site))
    return 0
