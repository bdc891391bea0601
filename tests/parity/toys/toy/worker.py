"""The toy notes the plans and rows of each star step."""

from starling.attention_backends.star.step_part import StepPart
from starling.features.worker_part import WorkerPart


class Step(StepPart):
    def __init__(self, seen):
        self.seen = seen

    def batch_known(self, batch):
        self.seen += zip(batch.plans, batch.query_lens, strict=True)


class Toy(WorkerPart):
    def __init__(self):
        self.seen = []

    def step_part(self, worker, plans, metadata):
        return Step(self.seen)

    def report(self):
        return {"toy": None}


PARTS = (Toy.make,)
