"""scripts/slurm.sbatch, with stand-ins for srun and scontrol: nodes, ranks of nodes and one rendezvous."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAND_INS = {
    # Runs the command once per node, as srun does with one task per node, and fails where one fails.
    "srun": """
echo "srun $1"
shift
status=0
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" || status=$?; done
exit $status
""",
    "scontrol": """[[ "$*" == "show hostnames node[07-09]" ]] && printf 'node07\\nnode08\\nnode09\\n'\n""",
    # In the place of an experiment's script.
    "run.sh": """
echo "node $NODE_RANK of $NNODES meets at $RDZV_ENDPOINT, $OPTIMIZERS:" "$@"
[[ "${1:-}" != fail ]]
""",
}


def slurm(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    of_a_job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "0123457", "SLURM_JOB_NODELIST": "node[07-09]"}
    of_a_job |= {"SLURM_JOB_NUM_NODES": "3", "OPTIMIZERS": "olion muon", "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", ROOT / "scripts/slurm.sbatch", *arguments],
        env={**os.environ, **of_a_job, **variables},
        capture_output=True,
        text=True,
    )


def test_each_node_runs_the_script_with_its_rank_and_one_rendezvous(tmp_path):
    ran = slurm(tmp_path, "run.sh", "a.toml", "--note", "two words")
    assert (ran.returncode, ran.stderr) == (0, "")
    port = 20_000 + 123_457 % 12_000
    assert ran.stdout.splitlines() == [
        "srun --kill-on-bad-exit=1",
        *(f"node {i} of 3 meets at node07:{port}, olion muon: a.toml --note two words" for i in range(3)),
    ]


def test_node_that_fails_fails_the_job(tmp_path):
    assert slurm(tmp_path, "run.sh", "fail").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), {}, "name the experiment's script"),
        (("nowhere.sh",), {}, "got 'nowhere.sh'"),
        (("run.sh",), {"SLURM_JOB_ID": "x[$(touch ran)]"}, "SLURM_JOB_ID must be a number"),
    ],
)
def test_a_call_outside_a_job_refuses_in_one_line(tmp_path, arguments, variables, message):
    ran = slurm(tmp_path, *arguments, **variables)
    assert ran.returncode == 1 and message in ran.stderr and ran.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", ["nanoGPT/run.sh", "Llama/run.sh", "Llama/run_llama_2_7b.sh", "SIT/run.sh"])
def test_scripts_of_experiments_read_the_variables_of_slurm(script):
    text = (ROOT / script).read_text() + (ROOT / "scripts/launch.sh").read_text()
    assert all(name in text for name in ("NNODES", "NODE_RANK", "RDZV_ENDPOINT"))
    assert subprocess.run(["bash", "-n", ROOT / script, ROOT / "scripts/slurm.sbatch"]).returncode == 0
