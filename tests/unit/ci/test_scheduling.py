"""The order in which two workers run files, with fakes of the workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from xdist.remote import Producer

from tests.scheduling import LONGEST, SERVERS, ServersBesideOthers


class Worker:
    """A worker of pytest-xdist that is told which tests to run."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.given: list[int] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def run(tests: list[str], speeds: tuple[int, int]) -> list[list[str]]:
    """The files that each worker runs, in order; in each round a worker runs as many tests as its speed says."""
    options = SimpleNamespace(tx=["2*popen"], maxworkerrestart=None, loadscopereorder=False)
    config = SimpleNamespace(option=options, getvalue=lambda name: getattr(options, name))
    workers = [Worker("gw0"), Worker("gw1")]
    scheduling = ServersBesideOthers(config, Producer("test", enabled=False))
    for worker in workers:
        scheduling.add_node(worker)
    for worker in workers:
        scheduling.add_node_collection(worker, tests)
    scheduling.schedule()
    done = [0, 0]
    while not all(count == len(worker.given) for count, worker in zip(done, workers, strict=True)):
        for number, worker in enumerate(workers):
            for index in worker.given[done[number] :][: speeds[number]]:
                done[number] += 1
                scheduling.mark_test_complete(worker, index)
    assert sorted(index for worker in workers for index in worker.given) == list(range(len(tests)))
    assert all(worker.shutting_down for worker in workers)
    return [list(dict.fromkeys(tests[index].split("::")[0] for index in worker.given)) for worker in workers]


def files(folder: str, count: int, tests: int = 4) -> list[str]:
    return [f"{folder}test_{number}.py::test_{test}" for number in range(count) for test in range(tests)]


@pytest.mark.parametrize("speeds", [(1, 9), (9, 1), (1, 1)])
def test_a_worker_helps_the_other_one_once_its_own_files_are_done(speeds):
    servers, others = run(files(SERVERS, 6) + files("tests/unit/", 6), speeds)
    of_servers = [[name.startswith(SERVERS) for name in names] for names in (servers, others)]
    assert of_servers[0] == sorted(of_servers[0], reverse=True) and of_servers[0][0]
    assert of_servers[1] == sorted(of_servers[1]) and not of_servers[1][0]
    assert any(of_servers[1]) is (speeds == (1, 9))
    assert all(of_servers[0]) is (speeds != (9, 1))


@pytest.mark.parametrize("folder", [SERVERS, "tests/unit/"])
def test_files_of_one_kind_alone_are_run_by_both(folder):
    assert all(run(files(folder, 5), (1, 1)))


def test_the_longest_files_with_servers_come_first():
    servers, _ = run([*files(SERVERS, 4), *(f"{name}::test_it" for name in LONGEST), *files("tests/unit/", 6)], (1, 1))
    assert servers[: len(LONGEST)] == list(LONGEST)
