"""The toy makes each chunk at most LONGEST tokens."""

from starling.scheduler.part import CorePart

LONGEST = 64


class Toy(CorePart):
    def bound(self, request, start, num_tokens):
        return min(num_tokens, LONGEST)


PARTS = (Toy.make,)
