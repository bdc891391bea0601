"""The connections of the evaluation's client: proxies, certificates, keys and pauses."""

from __future__ import annotations

import ipaddress

import httpx

from starling.lab.evaluation.answers import ACCEPTED

CONNECT_SECONDS = 30.0
MOST_PAUSE = 60.0  # seconds of a server's Retry-After that are obeyed


def make_http(base_url: str, api_key: str | None, timeout: float) -> httpx.AsyncClient:
    """The connections to a server. Those to this machine go to no proxy, whatever the environment says.

    Raises:
        ValueError: a key that can't be sent; a URL, a proxy or a file with certificates that can't be used.
    """
    refuse_key(api_key or "", "api_key")
    limits = httpx.Limits(max_connections=None)  # --concurrency limits them
    try:
        return httpx.AsyncClient(
            base_url=base_url,
            headers={"accept-encoding": ACCEPTED} | ({"authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=limits,
            # A transport that is given takes the place of the proxies of the environment.
            transport=httpx.AsyncHTTPTransport(limits=limits) if is_this_machine(base_url) else None,
        )
    except (httpx.InvalidURL, ImportError, ValueError, OSError) as error:
        raise ValueError(
            f"base_url={base_url!r} can't be used: {error}. A proxy is that of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, "
            "except for NO_PROXY, and certificates are those of SSL_CERT_FILE or SSL_CERT_DIR"
        ) from None


def is_this_machine(base_url: str) -> bool:
    """Whether a URL names a loopback address."""
    host = httpx.URL(base_url).host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def refuse_key(key: str, source: str) -> None:
    """Refuse (ValueError) a key that a header can't hold. The message does not show the key.

    Args:
        source: the option or the variable that gave the key.
    """
    if key != key.strip() or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"the key of {source} is refused: not all of it is printable ASCII, or it has white space at an end"
        )


def retry_after(response: httpx.Response) -> float:
    """Seconds after which the server wants to be asked again, at most MOST_PAUSE; 0 where it gives no number."""
    value = response.headers.get("retry-after", "")
    return min(float(value), MOST_PAUSE) if value.isascii() and value.isdigit() else 0.0
