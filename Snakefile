# The grid (abd_core/grid.py) for a cluster: a rule a kind of job, a record a job, then the table.
#
#     snakemake -c2 --config grids="table1 ablations"                                # here, two jobs at a time
#     snakemake --profile profiles/slurm --jobs 50 --config grids="table1 ablations" # on Slurm
#
# It shares records, runs and table with `make grid`: either goes on where the other one stopped. Another table than the
# committed one: `--config grids=table1 table=mine.csv`. Parameters for every cell, such as the paper's settings and
# data of one's own: `--config parameters=profiles/paper/03_defend.yaml table=mine.csv` (several files: with spaces).

import shlex
import sys
from pathlib import Path

from abd_core import grid, notebook

GRIDS = config.get("grids", "table1 ablations").split()
TABLE = Path(config.get("table", grid.default_table()))
FILES = [Path(path).resolve() for path in config.get("parameters", "").split()]
COMMON = notebook.given_parameters(FILES, [])
if COMMON and "table" not in config:
    sys.exit("parameters for every cell: --config table=... expected, the committed table is of the defaults")
LEFT = grid.undone({cell: cell.job(COMMON) for cell in grid.select(GRIDS)}, TABLE)
CHAINS = [job.chain() for job in LEFT.values()]
JOBS = {job.key: job for chain in CHAINS for job in chain}
RECORD = str(grid.folder() / "{key}.json")


def quoted(text):
    """For a shell command, in which Snakemake looks for names in braces."""
    return shlex.quote(str(text)).replace("{", "{{").replace("}", "}}")


RUN = " ".join([quoted(sys.executable), "-m abd_core.grid", *(f"-f {quoted(path)}" for path in FILES)])


def keys(stage):
    """The jobs of a stage, as a pattern."""
    return "|".join(key for key, job in JOBS.items() if job.stage == stage) or "none"


def base(wildcards):
    """What a job stands on. Its age says nothing: a record is named after everything that it depends on."""
    job = JOBS[wildcards.key].base
    return ancient(str(job.record)) if job else []


localrules:
    table,


rule table:  # no output: it costs nothing, and other grids' rows in the same file have to stay
    input:
        [str(chain[-1].record) for chain in CHAINS],
    shell:
        f"{RUN} {' '.join(GRIDS)} --output {quoted(TABLE)}"


rule victim:
    output:
        RECORD,
    wildcard_constraints:
        key=keys("poison"),
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        f"{RUN} --job {{wildcards.key}}"


rule perturbation:
    input:
        base,
    output:
        RECORD,
    wildcard_constraints:
        key=keys("adversary"),
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        f"{RUN} --job {{wildcards.key}}"


rule cell:
    input:
        base,
    output:
        RECORD,
    wildcard_constraints:
        key=keys("defend"),
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        f"{RUN} --job {{wildcards.key}}"
