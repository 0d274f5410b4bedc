"""Views of a run: its records are read and every figure is computed once, then rendered in any format.

:func:`build` makes a :class:`~d2obench.report.view.Report` of run folders, and :func:`write_report` writes it in the
formats asked for. Nothing here imports torch. From the records to the files:

1. ``derive`` computes the figures that compare cells by their raw samples, and ``rows`` joins the cells of different
   tasks into rows.
2. ``evidence`` decides from intervals what may be claimed about the rows.
3. ``sentences``, ``tables``, ``figures`` and ``machine`` make the parts of a page, and ``build`` puts them together as
   the plain data of ``view``. ``verdicts`` makes the same kind of page of a gate's verdicts.
4. ``render`` turns the page into each format, for which ``charts`` draws the figures. ``publish`` copies a run and its
   views to the published runs.
"""

from d2obench.report.build import build
from d2obench.report.render import FORMATS, check, write_report

__all__ = ["FORMATS", "build", "check", "write_report"]
