"""What the OpenAPI page describes, with anything in it: 4xx that says what is wrong, never a 5xx, never a lease."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from managed import Managed

from rfaas_mpi import api

PAGE = api.openapi()
OPERATIONS = [(method.upper(), path, operation) for path, operations in PAGE["paths"].items()
              for method, operation in operations.items()]
GUARD_S = 60.0
REQUESTS = int(os.environ.get("RFAAS_SOAK_REQUESTS", "600"))
ANY_TEXT = st.text(max_size=300)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT
    | st.sampled_from([-1, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, 1e308, "\x00", "../..", "'; DROP TABLE leases;"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4), max_leaves=8)


def schema_of(reference: dict) -> dict:
    while "$ref" in reference:
        reference = PAGE["components"]["schemas"][reference["$ref"].rpartition("/")[2]]
    return reference


def valid(schema: dict) -> st.SearchStrategy[Any]:
    """What the schema allows, with its bounds."""
    schema = schema_of(schema)
    if "anyOf" in schema:
        return st.one_of(*map(valid, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            low = schema.get("minimum", schema.get("exclusiveMinimum", -2**63 - 1) + 1)
            high = schema.get("maximum", schema.get("exclusiveMaximum", 2**63) - 1)
            return st.integers(low, high)
        case "number":
            low, high = schema.get("minimum", schema.get("exclusiveMinimum", -1e9)), schema.get("maximum", 1e9)
            return st.floats(low, high, exclude_min="exclusiveMinimum" in schema, allow_nan=False)
        case "string" if schema.get("contentEncoding") == "base64":
            return st.just("AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=")
        case "string" if "pattern" in schema:
            return st.from_regex(schema["pattern"].replace("$", r"\Z"), fullmatch=False).filter(
                lambda text: schema.get("minLength", 0) <= len(text) <= schema.get("maxLength", 300))
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=min(300, schema.get("maxLength", 300)))
        case "array" if "prefixItems" in schema:
            return st.tuples(*map(valid, schema["prefixItems"])).map(list)
        case "array":
            return st.lists(valid(schema.get("items", {})), min_size=schema.get("minItems", 0), max_size=4)
        case "object" if "properties" in schema:
            required = set(schema.get("required", ()))
            fields = {name: valid(each) for name, each in schema["properties"].items()}
            return st.fixed_dictionaries({name: each for name, each in fields.items() if name in required},
                                         optional={name: each for name, each in fields.items() if name not in required})
        case "object":
            keys = st.integers(0, 99).map(str)
            return st.dictionaries(keys, valid(schema.get("additionalProperties", {})), max_size=3)
    return ANYTHING


def nearly(body: st.SearchStrategy[dict]) -> st.SearchStrategy[Any]:
    """A body that is right but for one field: anything, missing, or one too many."""
    def spoilt(parts: tuple[dict, Any, Any, int]) -> dict:
        whole, name, thing, way = parts
        names = sorted(whole)
        field = names[name % len(names)] if names else "x"
        if way == 0:
            return {key: value for key, value in whole.items() if key != field}
        return {**whole, (field if way < 4 else f"x{field}"): thing}
    return st.tuples(body, st.integers(0, 99), ANYTHING, st.integers(0, 4)).map(spoilt)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bytes]:
    method, path, operation = draw(st.sampled_from(OPERATIONS))
    query = []
    for parameter in operation.get("parameters", ()):
        value = draw(valid(parameter["schema"]) | ANY_TEXT | st.integers().map(str))
        if parameter["in"] == "path":
            # An empty piece of a path is another path.
            path = path.replace(f"{{{parameter['name']}}}", quote(str(value), safe="") or "0")
        else:
            query.append(f"{parameter['name']}={quote(str(value), safe='')}")
    body: Any = None
    if "requestBody" in operation:
        right = valid(operation["requestBody"]["content"]["application/json"]["schema"])
        body = draw(right | nearly(right) | ANYTHING | st.binary(max_size=60))
    if isinstance(body, dict) and isinstance(body.get("timeout_s"), (int, float)):
        body["timeout_s"] = 0.0 if 0 <= body["timeout_s"] <= 86400 else body["timeout_s"]
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return method, path + ("?" + "&".join(query) if query else ""), data


class Raw:
    """Asks with any bytes, over one kept-alive connection."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket: socket.socket | None = None

    def ask(self, method: str, target: str, body: bytes = b"") -> tuple[int, dict]:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(GUARD_S)
            self._socket.connect(self.path)
            self._reader = self._socket.makefile("rb")
        self._socket.sendall(f"{method} {target} HTTP/1.1\r\nHost: m\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                             + body)
        status = int(self._reader.readline().split()[1])
        headers = {}
        while (line := self._reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        text = self._reader.read(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return status, json.loads(text) if "json" in headers["content-type"] else {"error": text.decode()}

    def close(self) -> None:
        if self._socket is not None:
            self._reader.close()
            self._socket.close()
            self._socket = None


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Iterator[Raw]:
    with Managed(tmp_path_factory.mktemp("manager")) as manager:
        asked = Raw(str(manager.socket))
        yield asked
        asked.close()


def test_the_strategies_reach_every_operation_and_make_bodies_that_are_taken(raw):
    taken = set()

    @settings(max_examples=30, deadline=None, database=None, derandomize=True,
              suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(st.data())
    def each(data: st.DataObject) -> None:
        for method, path, operation in OPERATIONS:
            if "requestBody" not in operation:
                continue
            body = data.draw(valid(operation["requestBody"]["content"]["application/json"]["schema"]))
            if "timeout_s" in body:
                body["timeout_s"] = 0.0
            status, answer = raw.ask(method, path.replace("{node}", "nid1").replace("{lease}", "5"),
                                     json.dumps(body).encode())
            if status != 400 or "the body is no" not in answer["error"]:
                taken.add(path)
            assert status < 500, (body, answer)
    each()
    assert taken == {path for _, path, operation in OPERATIONS if "requestBody" in operation}


@settings(max_examples=REQUESTS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                                   HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(request=requests())
def test_whatever_is_asked_the_answer_is_no_5xx_and_says_what_is_wrong(raw, request):
    method, target, body = request
    status, answer = raw.ask(method, target, body)
    assert status < 500, (request, answer)
    assert status == 200 or answer["error"], (request, answer)
    if status == 200 and method == "POST" and target == "/v1/leases":
        assert answer["leases"] == [], "a lease on cores that nobody lends"


def test_after_all_of_that_nothing_is_lent_and_the_manager_serves(raw):
    assert raw.ask("GET", "/v1/leases") == (200, {"leases": []})
    assert raw.ask("GET", "/v1/nodes")[0] == 200
    assert math.isfinite(raw.ask("GET", "/v1/events")[1]["first"])
