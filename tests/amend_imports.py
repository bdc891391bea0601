"""What the sitecustomize.py files of tests/ share: to change a module in every process, once the process imports it.

Imports the standard library alone, since it runs at the start of each process.
"""

import importlib.abc
import importlib.machinery
import sys


class _Amend(importlib.abc.MetaPathFinder):
    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


def amend(name, change):
    """Call ``change(module)`` once the module is imported, before any other takes something from it.

    So nothing is imported before its time.
    """
    sys.meta_path.insert(0, _Amend(name, change))
