"""Which worker of `pytest -n 2` runs which files."""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadFileScheduling

SERVERS = "tests/e2e/"
LONGEST = ("tests/e2e/test_two_hosts.py",)
"""Files of minutes, which come first: at the end the other workers would wait for them."""


class ServersBesideOthers(LoadFileScheduling):
    """The first worker starts with the files whose tests start servers, and the others with the other files.

    A server's tests wait most of their time for one process, so another worker has a core for the other tests. A worker
    that has run out of its files goes on with those that are left, so that all workers end at the same time.
    """

    def _assign_work_unit(self, node: Any) -> None:
        with_servers = node is self.nodes[0]
        own = [scope for scope in self.workqueue if scope.startswith(SERVERS) is with_servers]
        longest = [scope for scope in own if scope.startswith(LONGEST)]
        self.workqueue.move_to_end([*longest, *own, *self.workqueue][0], last=False)
        super()._assign_work_unit(node)
