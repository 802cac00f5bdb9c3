"""Proof: cases → comparison with both references → matrix → report.

Four words stand for four ideas. A *layout* is the shapes of the arrays, by name. A *family* is the
rule by which the numbers in them are drawn. A *case* is a spec in a layout, of a family, at a seed.
A *cell* is what the cases of a spec gave by one route on one backend, with the verdict on them. A
process that works on cells is given a *task*: some of them, whose arrays are the same.
"""
