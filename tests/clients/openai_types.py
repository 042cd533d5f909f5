"""An OpenAPI document of what OpenAI's Python SDK sends and reads, printed as JSON.

The SDK is generated from OpenAI's own OpenAPI document and carries all of its types, so this is
that document as far as our routes go, in the version that judges.txt pins.
"""

import json

from openai.types import (
    Completion,
    CreateEmbeddingResponse,
    Model,
    completion_create_params,
    embedding_create_params,
)
from openai.types.chat import ChatCompletion, completion_create_params as chat_create_params
from openai.types.responses import Response, response_create_params
from pydantic import TypeAdapter

COMPONENTS = {}


def schema(prefix, kind):
    """The schema of a type; those that it refers to go to the components."""
    template = "#/components/schemas/" + prefix + ".{model}"
    found = TypeAdapter(kind).json_schema(ref_template=template)
    for name, inner in found.pop("$defs", {}).items():
        COMPONENTS[f"{prefix}.{name}"] = inner
    return found


def answer(prefix, kind):
    content = {"application/json": {"schema": schema(prefix, kind)}}
    refusal = {"description": "why not", "content": {"application/json": {"schema": ERROR}}}
    return {"200": {"description": "the answer", "content": content}, "default": refusal}


def post(prefix, asked, answered):
    body = {"application/json": {"schema": schema(f"{prefix}Request", asked)}}
    return {
        "post": {
            "requestBody": {"required": True, "content": body},
            "responses": answer(prefix, answered),
        }
    }


# the SDK's errors are not generated; these are the fields that it reads
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
PATHS = {
    "/chat/completions": post(
        "Chat", chat_create_params.CompletionCreateParamsNonStreaming, ChatCompletion
    ),
    "/completions": post(
        "Text", completion_create_params.CompletionCreateParamsNonStreaming, Completion
    ),
    "/embeddings": post(
        "Embedding", embedding_create_params.EmbeddingCreateParams, CreateEmbeddingResponse
    ),
    "/responses": post(
        "Response", response_create_params.ResponseCreateParamsNonStreaming, Response
    ),
    "/models/{model}": {
        "get": {
            "parameters": [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
            ],
            "responses": answer("Model", Model),
        }
    },
}
# so that more than the refusal of an unknown model is seen
for path in PATHS.values():
    for operation in path.values():
        content = operation.get("requestBody", {"content": {}})["content"]
        for media in content.values():
            media["schema"]["properties"]["model"] = {"const": "strand-demo"}
            # the SDK's type of a vector is what it has become of the base64 that it asks for
            if "encoding_format" in media["schema"]["properties"]:
                media["schema"]["properties"]["encoding_format"] = {"const": "float"}
            # what an answer may take, on a small machine
            for name in ["max_tokens", "max_completion_tokens", "max_output_tokens"]:
                if name in media["schema"]["properties"]:
                    media["schema"]["properties"][name] = {"type": "integer", "maximum": 16}
document = {
    "openapi": "3.1.0",
    "info": {"title": "OpenAI's types", "version": "1"},
    "paths": PATHS,
    "components": {"schemas": COMPONENTS},
}
print(json.dumps(document))
