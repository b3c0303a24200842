"""Check a KubeRay resource by KubeRay's own custom resource definitions, as a server with strict fields does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import yaml


def problems(resource: dict[str, Any], folder: Path) -> list[str]:
    """Return what the definition of its kind in `folder` (ray.io_rayjobs.yaml …) finds wrong with a resource."""
    text = (folder / f"ray.io_{resource['kind'].lower()}s.yaml").read_text()
    version = resource["apiVersion"].partition("/")[2]
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = [
        each["schema"]["openAPIV3Schema"]
        for each in definition["spec"]["versions"]
        if each["name"] == version
    ]
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes checks it itself.
    found = jsonschema.Draft7Validator(closed(schema)).iter_errors(resource)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def closed(schema: Any) -> Any:
    """Return a schema that refuses fields which it does not list, and takes numbers where Kubernetes does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made = {"type": ["integer", "string"]}
    return made
