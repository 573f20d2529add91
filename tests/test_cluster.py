"""The cluster definitions hold: checked against the schemas of what reads them, offline."""

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import command_lines
import jsonschema
import pytest
import yaml
from conftest import ROOT

from serve.schemas import Arguments, validate

CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
CRDS = Path(os.environ.get("DDPM_KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay-crds")
POD_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def ray_cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec[{"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}[document["kind"]]]


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_cluster_spec(document)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON schema that knows no other fields than those it names."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def crd_problems(document: dict[str, Any]) -> list[str]:
    text = (CRDS / f"ray.io_{document['kind'].lower()}s.yaml").read_text()
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # a megabyte: 5 s without C
    version = document["apiVersion"].removeprefix("ray.io/")
    schema = next(v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == version)
    schema["properties"]["metadata"] = {}  # a built-in type, not described in the CRD
    del schema["properties"]["status"]
    errors = jsonschema.Draft7Validator(strict(schema)).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason="KubeRay's CRDs are not here: name their folder in DDPM_KUBERAY_CRDS"
)


@needs_crds
@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_files_fit_the_custom_resource_definitions(path: Path) -> None:
    assert crd_problems(load(path)) == []


@needs_crds
def test_that_check_sees_typos_and_wrong_types() -> None:
    document = load(CLUSTER / "kuberay" / "rayjob-train.yaml")
    document["spec"]["shutdownAfterJobFinish"] = True
    document["spec"]["ttlSecondsAfterFinished"] = "600"
    found = "\n".join(crd_problems(document))
    assert "shutdownAfterJobFinish" in found
    assert "'600' is not of type 'integer'" in found


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_files_pass_what_the_operator_checks_beyond_its_schema(path: Path) -> None:
    document = load(path)
    name = document["metadata"]["name"]
    assert re.fullmatch(POD_LABEL, name)
    assert len(name) <= 47
    for group in ray_cluster_spec(document)["workerGroupSpecs"]:
        assert re.fullmatch(POD_LABEL, group["groupName"])
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(document):
        assert "resources" not in group, "resources of the pod, not of the group"
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
    if document["kind"] == "RayJob":
        assert ("rayClusterSpec" in document["spec"]) != ("clusterSelector" in document["spec"])


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_pods_are_bounded_and_not_root(path: Path) -> None:
    for group in groups(load(path)):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def installed(package: str) -> str:
    return importlib.metadata.version(package)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_versions_are_the_ones_tested(path: Path) -> None:
    assert ray_cluster_spec(load(path))["rayVersion"] == installed("ray")
    assert ray_cluster_spec(load(path))["authOptions"] == {"mode": "token"}


def serve_configs() -> dict[str, dict[str, Any]]:
    """File name → Serve's configuration in it."""
    texts = {path.name: load(path)["spec"].get("serveConfigV2") for path in KUBERAY}
    inside = {name: yaml.safe_load(text) for name, text in texts.items() if text}
    return {"serve.yaml": load(CLUSTER / "serve.yaml"), **inside}


def unknown_keys(model: Any, values: Any, where: str = "") -> list[str]:
    """Keys that pydantic would drop silently."""
    if isinstance(values, list):
        return [key for i, value in enumerate(values) for key in unknown_keys(model, value, f"{where}[{i}]")]
    fields = getattr(model, "model_fields", None)
    if fields is None or not isinstance(values, dict):
        return []
    found = [f"{where}.{key}" for key in values if key not in fields]
    for key in values.keys() & fields.keys():
        found += unknown_keys(inner_model(fields[key].annotation), values[key], f"{where}.{key}")
    return found


def inner_model(annotation: Any) -> Any:
    if hasattr(annotation, "model_fields"):
        return annotation
    return next(filter(None, map(inner_model, getattr(annotation, "__args__", ()))), None)


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_serve_configurations_are_known_to_ray_and_to_the_application(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve_configs()[name]
    assert unknown_keys(ServeDeploySchema, config) == []
    ServeDeploySchema.model_validate(config)
    for application in config["applications"]:
        assert application["import_path"] == "serve.app:build_app"
        validate(Arguments, application["args"])


def test_that_check_sees_a_typo() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = load(CLUSTER / "serve.yaml")
    config["http_options"]["prot"] = 8000
    config["applications"][0]["deployments"] = [{"name": "Model", "max_ongoing_request": 3}]
    assert sorted(unknown_keys(ServeDeploySchema, config)) == [
        ".applications[0].deployments[0].max_ongoing_request",
        ".http_options.prot",
    ]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_runtime_environments_are_known_to_ray(path: Path) -> None:
    from ray.runtime_env import RuntimeEnv

    text = load(path)["spec"].get("runtimeEnvYAML")
    if text:
        RuntimeEnv(**yaml.safe_load(text))


def job_commands() -> list[str]:
    """Every `python -m jobs.X …` of the definitions; tests/test_docs.py has those of their README."""
    texts = [load(path)["spec"].get("entrypoint", "") for path in KUBERAY]
    found = [command for text in texts for command in command_lines.command_in(" ".join(text.split()))]
    assert found
    return found


@pytest.mark.parametrize("command", job_commands())
def test_commands_are_accepted_by_the_jobs_own_parsers(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command_lines.check(command, monkeypatch)


def check_launcher(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def test_the_launcher_file_is_known_to_ray_and_to_aws() -> None:
    config = load(CLUSTER / "launcher" / "aws.yaml")
    check_launcher(config)
    model = botocore_run_instances()
    for node_type in config["available_node_types"].values():
        parameters = {"MinCount": 1, "MaxCount": 1, **node_type["node_config"]}
        report = model[0].validate(parameters, model[1])
        assert not report.has_errors(), report.generate_report()


def botocore_run_instances() -> tuple[Any, Any]:
    """AWS' own description of what RunInstances takes."""
    import botocore.session
    from botocore.validate import ParamValidator

    service = botocore.session.get_session().get_service_model("ec2")
    return ParamValidator(), service.operation_model("RunInstances").input_shape


def test_that_check_sees_a_typo_in_the_launcher_file() -> None:
    config = load(CLUSTER / "launcher" / "aws.yaml")
    config["max_worker"] = config.pop("max_workers")
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        check_launcher(config)


def dockerfile() -> list[list[str]]:
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_of_the_tested_versions_and_what_it_copies_exists() -> None:
    instructions = dockerfile()
    assert instructions[0][1].startswith(f"rayproject/ray:{installed('ray')}-py3")
    assert [words[1] for words in instructions if words[0] == "USER"][-1] != "root"
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for words in instructions:
        if words[0] == "COPY":
            for source in [word for word in words[1:-1] if not word.startswith("--")]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in kept


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", CLUSTER / "local.sh", "start"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: usage: cluster/local.sh up | down | env\n"
