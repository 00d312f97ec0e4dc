"""The small twin of a program too wide to interpret: it goes through the same passes.

The twin is made once, by leaving out layers that others stand for (`dsc.rewrite.shallow`) and
shrinking every dim (`dsc.ir.shrink`). After each pass two things are checked: the layers left out
are still node for node like those that stay, and the twin has the operators of the program in the
same order. So what a pass did to the twin is what it did to the program. Where one fails, the pass
is verified on the whole program, shrunk alone, and the next twin is made anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dsc.ir.program import Program
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.shallow import Depth, alike, shallow
from dsc.rewrite.verify import WIDEST, Comparison, compare_programs, weight_elements


@dataclass
class Twin:
    """Compares programs before and after passes, in full or by a twin that it keeps."""

    seed: int = 0
    widest: int = WIDEST
    _deep: Program | None = None
    _small: Program | None = None
    _depth: Depth = field(default_factory=Depth)

    def compare(self, each: Pass, before: Program, after: Program) -> Comparison:
        """What the pass `each`, which made `after` of `before`, changed."""
        shown = each.comparable(before, after)
        if weight_elements(before) <= self.widest:
            return compare_programs(before, shown, each.tolerance, self.seed)
        if self._small is None or self._deep is not before:
            self._small = self._made(before)
        small = self._small
        done = each.run(small, PassReport())
        made = each.comparable(small, done)
        if not (alike(shown, made, self._depth) and self._depth.holds(shown)):
            self._deep = self._small = None
            return self._whole(each, before, after)
        self._deep, self._small = after, done
        form = f"shrunk ({self._depth})" if self._depth.instead else "shrunk"
        return compare_programs(small, made, each.tolerance, self.seed, form=form)

    def _made(self, program: Program) -> Program:
        """The twin of a program: few layers, small dims."""
        cut, self._depth = shallow(program)
        return cut.shrunk()

    def _whole(self, each: Pass, before: Program, after: Program) -> Comparison:
        def again(small: Program) -> Program:
            return each.comparable(small, each.run(small, PassReport()))

        return compare_programs(
            before, after, each.tolerance, self.seed, reapply=again, widest=self.widest
        )
