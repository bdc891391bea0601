"""Test only: lets vLLM's V2 model runner, whose kernels are Triton's, run on a machine without a GPU.

vLLM uses Triton on CPU where triton.backends has an entry `cpu` with an active driver. This puts one there
in every process that has this folder on PYTHONPATH; TRITON_INTERPRET=1 runs the kernels as Python.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _ActiveDriver:
    @staticmethod
    def is_active() -> bool:
        return True


class _AddCpu(importlib.abc.MetaPathFinder):
    """Amends triton.backends once it has been imported, so that nothing is imported before its time."""

    def find_spec(self, name, path=None, target=None):
        if name != "triton.backends":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader = spec.loader
        run = loader.exec_module

        def exec_module(module):
            run(module)
            module.backends["cpu"] = types.SimpleNamespace(driver=_ActiveDriver, compiler=None)

        loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AddCpu())
