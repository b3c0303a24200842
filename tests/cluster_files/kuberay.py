"""Check a KubeRay resource by KubeRay's own custom resource definitions, as a server with strict fields does.

They lie in the folder that SCHEMAS names, pruned to the schemas: its `source` has where they come from and what was changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

VERSION = "1.7.0"
SCHEMAS = Path(__file__).parent / f"kuberay_{VERSION.replace('.', '_')}/schemas.json"


def problems(resource: dict[str, Any]) -> list[str]:
    """Return what the definition of its kind finds wrong with a resource."""
    assert resource["apiVersion"] == "ray.io/v1"
    schemas = json.loads(SCHEMAS.read_text())
    schema = {**schemas[resource["kind"]], "definitions": schemas["definitions"]}
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
