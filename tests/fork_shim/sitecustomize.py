"""Test only: in every process that has this folder on PYTHONPATH, vLLM forks its processes instead of spawning them.

vLLM has both ways, and spawns on CPU. Each engine core and each worker then imports vLLM again, which takes most of the
start of a tiny model. The fixture `forked` of tests/e2e uses this folder.
"""

import importlib.abc
import importlib.machinery
import multiprocessing
import sys

MODULE = "vllm.utils.system_utils"


class _Fork(importlib.abc.MetaPathFinder):
    """Amends the module once it has been imported, before any other takes the function from it."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.get_mp_context = lambda: multiprocessing.get_context("fork")

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Fork())
