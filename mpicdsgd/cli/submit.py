"""``mpicdsgd submit``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpicdsgd.cli.arguments import Commands, add_config


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "submit",
        help="write a Slurm batch script for a run, and submit it",
        description="The job stops with a checkpoint before its time limit, and goes on by itself.",
    )
    add_config(command)
    command.add_argument("--nodes", type=int, required=True, metavar="N")
    command.add_argument("--time", required=True, metavar="H:M:S", help="the limit of each start")
    command.add_argument(
        "--ranks-per-node", type=int, default=1, metavar="R", help="one per GPU; default 1"
    )
    command.add_argument("--gpus-per-node", type=int, default=0, metavar="G")
    command.add_argument(
        "--stop-before",
        type=int,
        default=120,
        metavar="SECONDS",
        help="when the run is told to stop, before the limit; default 120",
    )
    command.add_argument(
        "--site", metavar="FILE", help="values of the site; default: MPICDSGD_SITE, jobs/site.sh"
    )
    command.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option of sbatch, as in --sbatch=--partition=gpu; may be given again",
    )
    command.add_argument("--dry-run", action="store_true", help="only show the script")
    command.set_defaults(run=submit)


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
