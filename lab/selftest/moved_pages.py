"""KV pages that move between processes. `python -m starling.lab.selftest.moved_pages SOURCE READER` says what is read.

SOURCE and READER are torch's devices: "cuda:0", "cpu". The pages are scattered, so that each page of each layer is a
read of its own. The last line of standard output has ``RESULT`` and then JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from starling.features.replicas.network import use_devices
from starling.features.replicas.page_transfer import PageReader, Transfer
from starling.lab.selftest.engine import RESULT

LAYERS, PAGES, PAGE_SHAPE = 32, {"cuda": 513, "cpu": 33}, (8, 16, 256)
"""Layers, pages, and the shape of a page, as of Llama-3.1-8B; the first page is vLLM's null page."""
SECONDS = 60.0


def make_caches(device: str, first: int) -> dict[str, torch.Tensor]:
    """Make the KV cache of each layer, (pages, heads, page size, 2 * head size), of two bytes an element.

    Args:
        first: content of the first layer's first page; each page of each layer has another one.
    """
    shape = (PAGES[torch.device(device).type], *PAGE_SHAPE)
    numbers = torch.arange(first, first + shape[0] * LAYERS, dtype=torch.int16).view(LAYERS, -1, 1, 1, 1)
    return {f"layers.{layer}": numbers[layer].expand(shape).contiguous().to(device) for layer in range(LAYERS)}


def make_reader(name: str, caches: dict[str, torch.Tensor]) -> PageReader:
    """Make a reader as a worker of a replica on this host makes it."""
    use_devices(True, os.environ)
    device = next(iter(caches.values())).device
    if device.type != "cpu":
        torch.cuda.set_device(device)
    num_pages = len(next(iter(caches.values())))
    return PageReader(f"{name}-{os.getpid()}", caches, num_pages, {"page_tokens": PAGE_SHAPE[1]}, SECONDS)


def hold_pages(connection: Connection, device: str) -> None:
    """Send the address of pages, and let another process read them until it closes the connection."""
    caches = make_caches(device, 1)  # a reader keeps their addresses alone
    reader = make_reader("source", caches)
    connection.send(reader.address())
    try:
        connection.recv()
    except EOFError:
        reader.close()


def read_pages(address: dict[str, Any], device: str) -> dict[str, float]:
    """Read all pages but the null page twice: the first time also connects.

    Returns:
        "bytes" and "seconds" of the second read, and "different", the pages of all layers that are not the source's.
    """
    caches, expected = make_caches(device, 1), make_caches(device, 1)
    reader = make_reader("reader", caches)
    pages = list(range(1, len(caches["layers.0"])))
    random.Random(0).shuffle(pages)
    for _ in range(2):
        for cache in caches.values():
            cache.zero_()
        if device != "cpu":
            torch.cuda.synchronize(device)
        transfer = Transfer()
        reader.begin(transfer, address, 1, pages, pages)
        while not reader.is_done(transfer):
            time.sleep(1e-4)
        seconds = transfer.seconds
    different = sum(int((cache[1:] != expected[name][1:]).flatten(1).any(1).sum()) for name, cache in caches.items())
    reader.close()
    return {"bytes": transfer.num_bytes, "seconds": seconds, "different": different}


def main(source: str, reader: str) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_pages, args=(theirs, source), daemon=True)
    process.start()
    theirs.close()
    found = read_pages(ours.recv(), reader)
    ours.close()
    process.join(SECONDS)
    print("\n" + RESULT + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
