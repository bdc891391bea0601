"""The toy leaves the overlap out of each plan, which responses show."""

from dataclasses import replace

from starling.features.front_part import FrontPart


class Toy(FrontPart):
    def planned(self, plan, options, prompt):
        return replace(plan, overlap_size=0)


PARTS = (Toy.make,)
