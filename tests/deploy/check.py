"""Checks the files in deploy/ without a cluster. Prints one problem per line, and nothing if all is well.

    check.py REPOSITORY ELBO

Manifests are rendered by kubectl's kustomize and checked against the schemas of Kubernetes, JobSet and the Prometheus
operator. Then come checks beyond schemas: names, labels, ports and mounts must fit each other and the program's flags. Scripts
are checked with shellcheck, container files with hadolint. All these programs come from the requirements.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator.v1 import PodMonitor
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

REPOSITORY, ELBO = Path(sys.argv[1]).resolve(), sys.argv[2]
TOOLS = Path(sys.executable).parent
DEPLOY = REPOSITORY / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
# The oldest and newest Kubernetes whose schemas are checked.
VERSIONS = ["1.34.0", "1.37.0"]
# Secrets that users create by hand (see deploy/kubernetes/README.md), with their keys.
BY_HAND = {
    "elbo-token": {"token"},
    "elbo-coordinator-tls": {"tls.crt", "tls.key", "ca.crt"},
    "elbo-worker-tls": {"tls.crt", "tls.key", "ca.crt"},
}

complaints = []


def complain(where, text):
    complaints.append(f"{where}: {text}")


def check(where, condition, text):
    if not condition:
        complain(where, text)


def run(*command, **options):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)


# ---- Kubernetes ----------------------------------------------------------------------------------------------------------------------


def render(directory, where):
    """The objects of a kustomization."""
    done = run(TOOLS / "kubectl", "kustomize", directory)
    if done.returncode != 0:
        complain(where, done.stderr.strip())
        return []
    check(where, not done.stderr.strip(), done.stderr.strip())
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def lost(given, kept, path=""):
    """Fields that a model did not keep, so it does not know them."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            # Empty fields are left out.
            if key not in kept and value not in ({}, [], None):
                yield f"{path}.{key}".lstrip(".")
            elif key in kept:
                yield from lost(value, kept[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list):
        for i, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(value, other, f"{path}[{i}]")


def against_schema(where, document):
    """Reports what the schema of an object's kind does not allow."""
    try:
        if document["kind"] == "JobSet":
            kept = JobsetV1alpha2JobSet.from_dict(document).to_dict()
        elif document["kind"] == "PodMonitor":
            kept = PodMonitor.model_validate(document).model_dump(by_alias=True, exclude_none=True, mode="json")
        else:
            for version in VERSIONS:
                kubernetes_validate.validate(document, version, strict=True)
            return
    except Exception as error:  # each of the three libraries has its own exceptions
        complain(where, " ".join(str(error).split())[:400])
        return
    for field in lost(document, kept):
        complain(where, f"unknown field {field}")


def jobs_of(documents):
    """The Jobs of a kustomization; those in JobSets are returned as separate Jobs."""
    for document in documents:
        if document["kind"] == "Job":
            yield document["metadata"]["name"], document
        if document["kind"] == "JobSet":
            for part in document["spec"]["replicatedJobs"]:
                name = f"{document['metadata']['name']}-{part['name']}"
                yield name, {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": part["template"]["spec"]}


def check_job(where, job, documents):
    spec = job["spec"]
    pod = spec["template"]["spec"]
    check(where, pod["restartPolicy"] == "Never", "podFailurePolicy needs restartPolicy: Never")
    rules = spec["podFailurePolicy"]["rules"]
    containers = {c["name"]: c for c in pod["containers"]}
    fates = {}
    for rule in rules:
        exits = rule.get("onExitCodes")
        if exits:
            check(where, exits["containerName"] in containers, f"podFailurePolicy is about a container {exits['containerName']}")
            fates.update({code: rule["action"] for code in exits["values"]})
    check(where, fates == {2: "FailJob", 3: "Ignore"}, f"fates of exit codes: {fates}")
    check(where, any(r["action"] == "Ignore" and r.get("onPodConditions", [{}])[0].get("type") == "DisruptionTarget" for r in rules),
          "preempted pods would count as failed")
    if spec.get("completionMode") == "Indexed":
        check(where, spec["completions"] == spec["parallelism"], "completions and parallelism differ: they can be changed only if equal")
    else:
        check(where, "backoffLimitPerIndex" not in spec, "backoffLimitPerIndex is for indexed Jobs")
        check(where, spec.get("podReplacementPolicy") == "Failed", "two coordinators could run at once")
    check(where, pod["terminationGracePeriodSeconds"] >= 60, "too little time to stop")
    check(where, pod["enableServiceLinks"] is False, "service links set variables ELBO_*")
    check(where, len(pod["containers"]) == 1, "one container")

    # The Pod Security Standard "restricted", and a read-only file system.
    security = pod["securityContext"]
    check(where, security["runAsNonRoot"] and security["runAsUser"] > 0, "runs as root")
    check(where, security["seccompProfile"]["type"] == "RuntimeDefault", "no seccomp profile")
    names = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    volumes = {v["name"]: v for v in pod["volumes"]}
    for container in pod["containers"]:
        own = container["securityContext"]
        check(where, own == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
              f"securityContext {own}")
        for kind in ["startupProbe", "livenessProbe", "readinessProbe"]:
            probe = container[kind]["httpGet"]
            path = "/readyz" if kind == "readinessProbe" else "/livez"
            check(where, probe == {"path": path, "port": "http"}, f"{kind} asks {probe}")
        check(where, {"requests", "limits"} <= container["resources"].keys() and "memory" in container["resources"]["limits"], "no resources")
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        check(where, set(mounts.values()) == volumes.keys(), f"mounts {sorted(mounts.values())} and volumes {sorted(volumes)} differ")

        # Every named file must be in a volume.
        environment = {e["name"]: e["value"] for e in container["env"]}
        check(where, re.sub(r".*/|:.*", "", container["image"]) in ("elbo", "elbo-cuda"), f"image {container['image']}: no container file makes it")
        check(where, len(environment) == len(container["env"]), "a variable is set twice")
        named = [a for a in container["args"] if a.startswith("/")] + [v for v in environment.values() if v.startswith("/")]
        for path in named:
            mount = max((m for m in mounts if path == m or path.startswith(m + "/")), key=len, default=None)
            volume = volumes.get(mounts.get(mount), {})
            if "secret" in volume:
                keys = BY_HAND.get(volume["secret"]["secretName"], set())
            elif "configMap" in volume:
                keys = names.get(("ConfigMap", volume["configMap"]["name"]), {}).get("data", {}).keys()
            else:
                check(where, "emptyDir" in volume or "hostPath" in volume, f"{path} is in no volume")
                continue
            check(where, path.removeprefix(f"{mount}/") in keys, f"{path} is not in its volume, which has {sorted(keys)}")
        for volume in volumes.values():
            if "configMap" in volume:
                check(where, ("ConfigMap", volume["configMap"]["name"]) in names, f"no ConfigMap {volume['configMap']['name']}")
        check(where, ("ServiceAccount", pod["serviceAccountName"]) in names, f"no ServiceAccount {pod['serviceAccountName']}")

        check_flags(where, container, environment)
        check_ports(where, container, environment, names)


def check_flags(where, container, environment):
    """Checks that the program has these flags and variables."""
    command = "worker" if container.get("command") else container["args"][0]
    known = run(ELBO, command, "--help").stdout
    for flag in [a for a in container["args"] if a.startswith("--")]:
        check(where, re.search(rf"{flag}\b", known), f"`elbo {command}` has no flag {flag}")
    for variable in environment:
        # ELBO_CACHE has no flag.
        if variable.startswith("ELBO_") and variable != "ELBO_CACHE":
            check(where, re.search(rf"env: {variable}[=\]]", " ".join(known.split())), f"`elbo {command}` reads no variable {variable}")


def check_ports(where, container, environment, names):
    """Checks that listening, offered and requested ports are the same."""
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    flags = dict(zip(container["args"], container["args"][1:], strict=False))
    check(where, flags.get("--http") == f"0.0.0.0:{ports['http']}", f"--http {flags.get('--http')}, port {ports['http']}")
    if "grpc" in ports:
        check(where, flags.get("--listen") == f"0.0.0.0:{ports['grpc']}", f"--listen {flags.get('--listen')}, port {ports['grpc']}")
    if url := environment.get("ELBO_COORDINATOR"):
        scheme, host, port = re.fullmatch(r"(https?)://([a-z-]+):(\d+)", url).groups()
        service = names.get(("Service", host))
        check(where, service and int(port) in [p["port"] for p in service["spec"]["ports"]], f"no Service answers at {url}")
        check(where, (scheme == "https") == ("ELBO_TLS_CA" in environment), f"{url}, but ELBO_TLS_CA says otherwise")


def check_selectors(where, documents, jobs):
    """Checks that every selector finds pods, and that they have the ports it names."""
    pods = [(j["spec"]["template"]["metadata"]["labels"], j["spec"]["template"]["spec"]) for j in jobs]

    def find(selector):
        return [pod for labels, pod in pods if selector.items() <= labels.items()]

    def ports(pod):
        return {p["name"] for c in pod["containers"] for p in c["ports"]}

    for document in documents:
        kind, name, spec = document["kind"], document["metadata"]["name"], document.get("spec", {})
        selector = {
            "Service": lambda: spec["selector"],
            "PodDisruptionBudget": lambda: spec["selector"]["matchLabels"],
            "PodMonitor": lambda: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda: spec["podSelector"]["matchLabels"],
        }.get(kind)
        if not selector:
            continue
        found = find(selector())
        wanted = {"elbo-metrics": 2, "elbo": 2}.get(name, 1)
        check(where, len(found) == wanted, f"{kind} {name} selects {len(found)} pods")
        named = [p["targetPort"] for p in spec.get("ports", [])] + [e["port"] for e in spec.get("podMetricsEndpoints", [])]
        for rule in spec.get("ingress", []):
            named += [p["port"] for p in rule["ports"]]
            for source in rule["from"]:
                if "podSelector" in source:
                    check(where, find(source["podSelector"]["matchLabels"]), f"{kind} {name} lets in nobody")
        for port in named:
            check(where, all(port in ports(pod) for pod in found), f"{kind} {name}: no port {port}")


def check_words(where, document):
    """Checks words that a schema treats as plain strings."""
    kind, spec, metadata = document["kind"], document.get("spec", {}), document["metadata"]
    if kind == "NetworkPolicy":
        check(where, set(spec["policyTypes"]) <= {"Ingress", "Egress"}, f"policyTypes {spec['policyTypes']}")
    if kind == "JobSet":
        parts = {part["name"] for part in spec["replicatedJobs"]}
        check(where, set(spec["successPolicy"]["targetReplicatedJobs"]) <= parts, f"successPolicy names {spec['successPolicy']}")
        actions = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
        reasons = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
        for rule in spec["failurePolicy"]["rules"]:
            check(where, rule["action"] in actions and set(rule["onJobFailureReasons"]) <= reasons, f"failurePolicy {rule}")
    known = {"kueue.x-k8s.io/" + name for name in ["queue-name", "job-min-parallelism", "job-completions-equal-parallelism"]}
    for key in [*metadata.get("labels", {}), *metadata.get("annotations", {})]:
        check(where, not key.startswith("kueue.") or key in known, f"{kind} has {key}, which Kueue does not read")


def check_kustomization(directory, where):
    documents = render(directory, where)
    for document in documents:
        against_schema(f"{where}: {document['kind']} {document['metadata']['name']}", document)
    jobs = list(jobs_of(documents))
    check(where, sorted(name for name, _ in jobs) == ["elbo-coordinator", "elbo-worker"], f"Jobs {[name for name, _ in jobs]}")
    for name, job in jobs:
        # Jobs in a JobSet are also checked against the Job's strict schema.
        against_schema(f"{where}: Job {name}", job)
        check_job(f"{where}: {name}", job, documents)
        if name == "elbo-worker":
            check_worker_command(where, job["spec"]["template"]["spec"]["containers"][0])
    check_selectors(where, documents, [job for _, job in jobs])
    for document in documents:
        check_words(where, document)
        if document["kind"] == "ConfigMap":
            check_job_file(where, document["data"])


def check_job_file(where, data):
    """Checks that the program accepts the job, by planning it on the digits."""
    demo = REPOSITORY / "cli/demo"
    with tempfile.TemporaryDirectory() as home:
        for name, text in data.items():
            Path(home, name).write_text(text)
        classes = Path(home, "classes.txt") if "classes.txt" in data else demo / "classes.csv"
        done = run(ELBO, "plan", "--job", Path(home, "job.toml"), "--images", demo / "images", "--model", demo / "model", "--classes", classes)
        check(where, done.returncode == 0, f"job.toml: {done.stderr.strip()}")


def check_worker_command(where, container):
    """Checks that a worker ends with 3 if it is asked to stop, and otherwise with the program's exit code."""
    with tempfile.TemporaryDirectory() as home:
        program = Path(home, "elbo")

        def outcome(script, term):
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
            worker = subprocess.Popen([*container["command"], *container["args"]], env={"PATH": f"{home}:/usr/bin:/bin"},
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
            # The program prints a line once it runs.
            said = worker.stdout.readline().strip()
            if term:
                worker.send_signal(signal.SIGTERM)
            try:
                return said, worker.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                return said, "never"

        said = "worker " + " ".join(container["args"])
        waits = "trap 'sleep 0.2; exit 0' TERM; echo $*; while :; do sleep 0.1; done"
        for script, term, code in [(waits, True, 3), ("echo $*; exit 0", False, 0), ("echo $*; exit 1", False, 1), ("echo $*; exit 2", False, 2)]:
            got = outcome(script, term)
            check(where, got == (said, code), f"the worker's command, for a program that does `{script}`: {got}, not {(said, code)}")


def check_readme():
    """Checks the kustomization in README.md."""
    text = (KUBERNETES / "README.md").read_text()
    example = re.search(r"((?:    .*\n)+)", text[text.index("    # my-job/kustomization.yaml"):]).group(1)
    with tempfile.TemporaryDirectory() as home:
        shutil.copytree(DEPLOY, Path(home, "deploy"))
        job = Path(home, "my-job")
        job.mkdir()
        for name in ["job.toml", "classes.txt"]:
            shutil.copy(KUBERNETES / "base" / name, job)
        (job / "kustomization.yaml").write_text(textwrap.dedent(example))
        check_kustomization(job, "the example in deploy/kubernetes/README.md")


# ---- Slurm and containers ------------------------------------------------------------------------------------------------------------


def check_scripts():
    scripts = sorted((DEPLOY / "slurm").glob("*.s[hb]*"))
    check("deploy/slurm", len(scripts) == 3, f"scripts {[s.name for s in scripts]}")
    done = run(TOOLS / "shellcheck", "--shell=bash", "--format=gcc", *scripts)
    check("shellcheck", done.returncode == 0, done.stdout + done.stderr)


def check_containers():
    files = sorted(DEPLOY.rglob("Containerfile"))
    check("deploy", len(files) == 2, f"container files {files}")
    for file in files:
        # DL3008 wants pinned Debian packages, but we want the current ones with security fixes.
        done = run(TOOLS / "hadolint", "--ignore", "DL3008", file)
        check(file.relative_to(REPOSITORY), done.returncode == 0, done.stdout + done.stderr)
        stages = file.read_text().split("\nFROM ")
        check(file.relative_to(REPOSITORY), re.search(r"^USER [1-9]\d*", stages[-1], re.M), "its user must be a number other than 0")
        check(file.relative_to(REPOSITORY), re.search(r'^ENTRYPOINT \["elbo"\]', stages[-1], re.M), "its entry point is not elbo")


for kustomization in sorted(KUBERNETES.rglob("kustomization.yaml")):
    # Components are checked through the overlays that use them.
    if yaml.safe_load(kustomization.read_text())["kind"] == "Kustomization":
        check_kustomization(kustomization.parent, kustomization.parent.relative_to(REPOSITORY))
check_readme()
used = "".join(p.read_text() for p in KUBERNETES.glob("overlays/*/kustomization.yaml"))
for component in (KUBERNETES / "components").iterdir():
    check(component.name, f"components/{component.name}\n" in used, "no overlay uses this component, so nothing checks it")
check_scripts()
check_containers()
print("\n".join(complaints), end="\n" if complaints else "")
sys.exit(1 if complaints else 0)
