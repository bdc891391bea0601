"""The tasks, and how they are chosen by name."""

from __future__ import annotations

from collections.abc import Sequence

from starling.lab.evaluation.tasks import associations, code, counting, needles, notes, tracking
from starling.lab.evaluation.tasks.base import Example, Match, Task

__all__ = ["GROUPS", "TASKS", "Example", "Match", "Task", "choose_tasks"]

TASKS: dict[str, Task] = {
    task.name: task for module in (needles, tracking, counting, notes, associations, code) for task in module.TASKS
}
GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(TASKS),
    "ruler": tuple(name for name, task in TASKS.items() if task.source == "RULER"),
}


def choose_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names, in the order of TASKS.

    Args:
        names: a task's name; the start of names up to an underscore, such as niah or niah_multikey; or a group.

    Raises:
        ValueError: a name that stands for no task.
    """
    chosen: set[str] = set()
    for name in names:
        found = GROUPS.get(name) or [task for task in TASKS if task == name or task.startswith(f"{name}_")]
        if not found:
            raise ValueError(
                f"tasks={name!r} is refused: there is no such task. Allowed: {', '.join((*GROUPS, *TASKS))}, or the "
                "start of names up to an underscore, such as niah."
            )
        chosen.update(found)
    return [task for name, task in TASKS.items() if name in chosen]
