"""The HTTP interface as an OpenAPI 3.1 document, from the routes and the types that their bodies are read as. This file serves nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel
from starlette.routing import Route

from .bodies import Cancel, Empty, Finish, Path, Project, Telemetry, Ttl
from .openai_api import ChatRequest, TextRequest
from .shelf import KINDS

__all__ = ["document"]

Schema: TypeAlias = dict[str, Any]
COMPONENTS = "#/components/schemas/"
PAGE: Sequence[Schema] = (
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 1000}},
    {"name": "offset", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 10**8}},
)
TIME: Schema = {"type": "string", "format": "date-time"}
QUERIES: Mapping[str, Sequence[Schema]] = {
    "/api/v1/training_runs": PAGE,
    "/api/v1/checkpoints": PAGE,
    "/api/v1/sessions": PAGE,
    "/api/v1/audit": ({"name": "day", "in": "query", "schema": {"type": "string", "format": "date"}},),
    "/api/v1/billing/usage/events": tuple({"name": name, "in": "query", "required": True, "schema": TIME} for name in ("starting_on", "ending_before")),
}
OPEN = ("/api/v1/healthz", "/api/v1/files/{run}/{name}/{file}", "/api/v1/traces/{session}")


def _bodies() -> dict[tuple[str, str], type[BaseModel]]:
    from tinker import types
    from tinker.types.future_retrieve_request import FutureRetrieveRequest
    from tinker.types.futures_retrieve_request import FuturesRetrieveRequest

    v1: dict[str, type[BaseModel]] = {
        "create_session": types.CreateSessionRequest,
        "session_heartbeat": types.SessionHeartbeatRequest,
        "create_model": types.CreateModelRequest,
        "load_weights": types.LoadWeightsRequest,
        "get_info": types.GetInfoRequest,
        "optim_step": types.OptimStepRequest,
        "save_weights": types.SaveWeightsRequest,
        "save_weights_for_sampler": types.SaveWeightsForSamplerRequest,
        "save_weights_external": types.SaveWeightsExternalRequest,
        "create_sampling_session": types.CreateSamplingSessionRequest,
        "join_sampling_session": types.JoinSamplingSessionRequest,
        "asample": types.SampleRequest,
        "retrieve_future": FutureRetrieveRequest,
        "retrieve_futures": FuturesRetrieveRequest,
        "cancel_future": Cancel,
        "create_custom_loss": Empty,
        "telemetry": Telemetry,
        "client/config": Empty,
        "client/dynamic_config": Empty,
        "sessions/{session}/finish": Finish,
        "sessions/search": types.SessionSearchRequest,
        "weights_info": Path,
        "copy_weights": types.CopyWeightsRequest,
    }
    found = {("POST", f"/api/v1/{path}"): model for path, model in v1.items()}
    found["PUT", "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/ttl"] = Ttl
    found["PUT", "/api/v1/sessions/{session}/project"] = Project
    found["POST", "/v1/completions"], found["POST", "/v1/chat/completions"] = TextRequest, ChatRequest
    return found


def _body(model: type[BaseModel], schemas: Schema) -> Schema:
    whole = model.model_json_schema(ref_template=COMPONENTS + "{model}")
    schemas.update(whole.pop("$defs", {}))
    if model.__name__ == "OptimStepRequest":  # the SDK writes AdamW's numbers under another name than it reads them
        properties = whole["properties"]
        properties["adam_params"] = {"$ref": COMPONENTS + "AdamParams"}
        whole["required"] = [name for name in whole["required"] if name != "optim_params"]
        whole["oneOf"] = [{"required": ["adam_params"]}, {"required": ["optim_params"]}]
    schemas[model.__name__] = whole
    return {"required": True, "content": {"application/json": {"schema": {"$ref": COMPONENTS + model.__name__}}}}


def _parameters(path: str) -> list[Schema]:
    found: list[Schema] = []
    for name in re.findall(r"{(\w+)}", path):
        schema: Schema = {"type": "string", "minLength": 1} | ({"enum": list(KINDS)} if name == "kind" else {})
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    return [*found, *QUERIES.get(path, ())]


def document(routes: Sequence[Route], title: str, version: str) -> Schema:
    """The document of these routes. Every body that it calls invalid is refused with 400."""
    bodies, paths = _bodies(), dict[str, dict[str, Schema]]()
    schemas: Schema = {
        "Problem": {
            "type": "object",
            "required": ["detail", "error"],
            "properties": {
                "detail": {"type": "string"},
                "error": {"type": "object", "properties": {"message": {"type": "string"}, "type": {"type": "string"}}},
            },
        }
    }
    problem = {"description": "What happened, and how to mend it.", "content": {"application/json": {"schema": {"$ref": COMPONENTS + "Problem"}}}}
    for route in routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            name = f"{method} {route.path}"
            operation: Schema = {"operationId": re.sub(r"\W+", "_", name).strip("_").lower(), "summary": name}
            if parameters := _parameters(route.path):
                operation["parameters"] = parameters
            if (method, route.path) in bodies:
                operation["requestBody"] = _body(bodies[method, route.path], schemas)
            elif route.path.endswith("/forward_backward"):
                binary = {"type": "string", "contentMediaType": "application/x-protobuf", "description": "tinker_public.ForwardBackwardRequest"}
                operation["requestBody"] = {"required": True, "content": {"application/x-protobuf": {"schema": binary}}}
            operation["responses"] = {"2XX": {"description": "Done, or taken."}, "4XX": problem}
            if route.path in OPEN:
                operation["security"] = []
            paths.setdefault(route.path, {})[method.lower()] = operation
    schemes = {"key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}, "bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": "The Tinker protocol of SDK 0.38.0, and an OpenAI-compatible one."},
        "security": [{"key": []}, {"bearer": []}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": schemes},
    }
