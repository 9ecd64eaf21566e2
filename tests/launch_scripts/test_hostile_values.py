"""Launch scripts given text where they expect numbers, from files and the environment, and links where they write."""

import os
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch_scripts.test_launch_scripts import CONFIG, run, shell

COMMANDS = (
    "PATH[$(>evil)]",  # of a variable that is set, and without a space
    "a[$(touch evil)]",
    "x[`touch evil`]+1",
    "1+a[$(touch evil)0]",
    "$(touch evil)",
    "'; touch evil; '",
    "-1",
    "0x10",
    "08",
    "1e3",
    "9" * 30,
    "٣",
    "1\n2",
    "",
)
STUBS = "run={run}; SLURM_JOB_ID=7; scontrol() {{ echo queued; }}; sleep() {{ :; }}"
VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_GPUS_ON_NODE",
    "SLURM_CPUS_PER_TASK",
    "MASTER_PORT",
)
JOB = {"SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": 1, "MASTER_ADDR": "localhost"}


@pytest.fixture(autouse=True)
def nothing_runs():
    """No value may run a command: each would make a file named evil in the working directory."""
    assert not (ROOT / "evil").exists()
    yield
    found = (ROOT / "evil").exists()
    (ROOT / "evil").unlink(missing_ok=True)
    assert not found


@pytest.mark.parametrize("count", COMMANDS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_file_of_requeues_is_text(place, count, tmp_path):
    words = ["7", "2", ""]
    words[place] = count
    (tmp_path / "requeues").write_text(" ".join(words))
    assert "queued" in shell(f"{STUBS.format(run=tmp_path)}; requeue_job preempted")
    assert (tmp_path / "requeues").read_text().startswith("7 ")


@pytest.mark.parametrize("value", COMMANDS[:-1])
@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_srun.sbatch"])
def test_variables_of_a_job_are_numbers(script, variable, value, tmp_path):
    done = run(script, CONFIG, "--output", tmp_path, PYTHON="/bin/echo", **JOB | {variable: value})
    assert done.returncode == 2
    assert "not a" in done.stderr
    assert "number" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", COMMANDS[:-1])
@pytest.mark.parametrize(
    ("script", "variable"),
    [
        *(("torchrun.sh", name) for name in ("SLURM_JOB_ID", "MASTER_PORT", "NPROC_PER_NODE", "NNODES", "NODE_RANK")),
        *(("elastic.sh", name) for name in ("SLURM_JOB_ID", "MASTER_PORT", "NPROC_PER_NODE")),
    ],
)
def test_variables_of_torchrun_are_numbers(script, variable, value):
    flags = ("-n", "1:2", "-a", "localhost") if script == "elastic.sh" else ()
    several = {} if script == "elastic.sh" else {"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "localhost"}
    done = run(script, *flags, CONFIG, PYTHON="/bin/echo", **several | {variable: value})
    assert done.returncode == 2
    assert "number" in done.stderr


@pytest.mark.parametrize("port", ["0", "65536", "99999"])
def test_port_is_one(port):
    done = run("torchrun.sh", "-n", 2, "-r", 0, "-a", "localhost", "-p", port, CONFIG, PYTHON="/bin/echo")
    assert f"not a port number: {port}" in done.stderr


def test_control_characters_are_not_printed():
    done = run("torchrun.sh", "-g", "\x1b]0;owned\x07", CONFIG)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert "not a number: ?]0;owned?" in done.stderr


def test_folders_of_cdpath_are_not_entered(tmp_path):
    (tmp_path / "launch_scripts").mkdir()
    done = run("torchrun.sh", CONFIG, PYTHON="/bin/echo", CDPATH=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{ROOT}/train.py" in done.stdout


def test_link_in_place_of_the_requeues_is_replaced(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("7 5 ")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/requeues").symlink_to(victim)
    assert "queued" in shell(f"{STUBS.format(run=tmp_path / 'run')}; requeue_job preempted")
    assert victim.read_text() == "7 5 "
    assert (tmp_path / "run/requeues").read_text() == "7 1 \n"
    assert not (tmp_path / "run/requeues").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "no folder", "pipe", "endless"])
def test_job_is_requeued_though_the_file_of_requeues_cannot_be_written_or_read(kind, tmp_path):
    place = tmp_path / "missing" if kind == "no folder" else tmp_path
    if kind == "folder":
        (tmp_path / "requeues").mkdir()
        (tmp_path / "requeues/full").touch()
    elif kind == "pipe":
        os.mkfifo(tmp_path / "requeues")
    elif kind == "endless":
        with (tmp_path / "requeues").open("wb") as file:
            file.truncate(2**40)
    output = shell(f"{STUBS.format(run=place)}; requeue_job preempted 2>&1")
    assert "queued" in output
    assert ("cannot be written" in output) == (kind in ("folder", "no folder"))
    assert not list(tmp_path.glob(".requeues*"))


def test_permissions_of_the_requeues_follow_the_umask(tmp_path):
    shell(f"{STUBS.format(run=tmp_path)}; umask 027; requeue_job preempted")
    assert (tmp_path / "requeues").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["logs", "logs/7-0", "logs/7-0/node.txt"])
def test_links_in_the_logs_are_refused(name, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    script = f"run={tmp_path}/run; logs=$run/logs/7-0; (make_logs 2>&1) || echo refused"
    assert shell(script).endswith("refused")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["lock", "part"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_staging_follows_no_predictable_name(name, kind, tmp_path):
    source, victim = tmp_path / "source", tmp_path / "victim"
    source.mkdir()
    (source / "a").touch()
    if name == "lock":
        victim.write_text("mine")
    else:
        victim.mkdir()
        (victim / "mine").write_text("mine")
        victim.chmod(0o500)
    taken = Path(f"{tmp_path / 'target'}.{name}")
    taken.symlink_to(victim) if kind == "link" else os.mkfifo(taken)
    done = run("stage.sh", source, tmp_path / "target")
    assert done.returncode == 1
    assert f"{taken} on " in done.stderr
    assert "name another TARGET" in done.stderr
    assert (victim if name == "lock" else victim / "mine").read_text() == "mine"
    assert name == "lock" or victim.stat().st_mode & 0o777 == 0o500
    assert not (tmp_path / "target").exists()


def test_lock_file_of_staging_keeps_its_content(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target.lock").write_text("mine")
    assert run("stage.sh", tmp_path / "source", tmp_path / "target").returncode == 0
    assert (tmp_path / "target.lock").read_text() == "mine"


def test_arithmetic_is_on_values_that_were_matched():
    """List the arithmetic of all shell scripts: a new one must be added here with the reason why its values are numbers."""
    scripts = [*(ROOT / "launch_scripts").iterdir(), ROOT / ".ci/run", *(ROOT / "benchmarks").glob("*.sh")]
    found = {text for path in scripts for text in re.findall(r"\$\(\([^)]*\)\)", path.read_text())}
    known = {
        *("$((OPTIND - 1))", "$((gpus > 0 ? gpus : 1))"),  # of getopts, of wc
        *("$((20000 + SLURM_JOB_ID % 10000))", "$((count + 1))", "$((SLURM_GPUS_ON_NODE * SLURM_NNODES))"),  # is_number
        *(f"$(({start}0000 + $1 % 10000))" for start in (2, 3, 4, 5)),
        *("$(($1 % 10000))", "$((pictures * 4))", "$(($1 * scale))", "$(($2 * scale))", "$(($(date +%s)"),
        *(
            "$((4 * seconds))",
            "$((start - began + 20))",
            "$((seconds - start + began))",
        ),  # digits of --seconds, of date
        *("$((45 * count))", "$((60 * shorter))", "$((30 * shorter))"),  # of grep -c
    }
    assert found - known == set()
