"""The description of the API is made at the server's start."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from starling.engine_ext.serving.http.middleware import DescribeApi
from starling.engine_ext.start.activation import HTTP, MIDDLEWARE


@pytest.mark.parametrize("url", ["/openapi.json", None])
def test_the_description_is_made_before_the_first_request(url):
    assert f"{HTTP}.middleware.DescribeApi" in MIDDLEWARE
    app = FastAPI(openapi_url=url)
    app.add_middleware(DescribeApi)
    with TestClient(app) as http:
        made = app.openapi_schema
        assert (made is not None) == (url is not None)
        assert http.get("/openapi.json").status_code == (200 if url else 404)
        assert app.openapi_schema is made
