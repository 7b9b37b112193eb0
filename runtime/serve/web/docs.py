"""The routes as a page: made here of the OpenAPI document, so that a browser asks no other host."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>localcontrol: the routes</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/docs/style.css"></head><body><main>
"""
STYLE = """:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font: 600 1rem/1.4 ui-monospace, monospace; margin: 2rem 0 .25rem; }
h2 b { color: #1a6; display: inline-block; min-width: 5rem; }
p { margin: .25rem 0; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
td, th { border-top: 1px solid #8884; padding: .25rem .5rem .25rem 0; text-align: left; vertical-align: top; }
td:first-child { font-family: ui-monospace, monospace; white-space: nowrap; }
"""


def page(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document."""
    schemas = document["components"]["schemas"]
    parts = [
        HEAD,
        f"<h1>{_text(document['info']['title'])}</h1><p>{_text(document['info']['description'])}</p>",
    ]
    parts += ["<p>The whole of it, for programs: <a href='/openapi.json'>/openapi.json</a></p>"]
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            parts.append(
                f"<h2><b>{method.upper()}</b> {_text(path)}</h2><p>{_text(about.get('description', ''))}</p>"
            )
            for kind, content in about.get("requestBody", {}).get("content", {}).items():
                schema = content["schema"]
                name = schema.get("$ref", "").rpartition("/")[2]
                parts.append(f"<p>Body, {_text(kind)}:</p>")
                parts += _table(schemas[name] if name else schema)
    regions = schemas["RegionBody"]
    parts += [
        f"<h2>A region</h2><p>{_text(regions['description'])}</p>",
        *_table(regions),
        "</main></body></html>",
    ]
    return "\n".join(parts)


def _table(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the rows of a schema's fields."""
    if "properties" not in schema:
        return
    yield "<table>"
    needed = schema.get("required", ())
    for name, field in schema["properties"].items():
        default = field.get("default")
        said = [field.get("description", ""), "needed" if name in needed else ""]
        said += [f"default {json.dumps(default)}"] if default not in (None, [], False) else []
        said += [", ".join(map(str, field["enum"]))] if "enum" in field else []
        yield f"<tr><td>{_text(name)}</td><td>{_text('; '.join(filter(None, said)))}</td></tr>"
    yield "</table>"


def _text(value: str) -> str:
    return html.escape(" ".join(str(value).split()))
