"""One command for a day with a GPU: what the kernels do there, in one file that can be sent.

Parts, in the order of their worth (:mod:`.parts`), each in a process of its own with a limit (:mod:`.runner`). A part
is a list of items; every row is written as it is measured (:mod:`.stream`), so that a part that hangs or takes its
process with it leaves what it found, and is started again without the item that did it. At the end, also after Ctrl-C,
all rows are one JSON document, which ``benchmarks/readme_tables.py`` reads.

It has not run on a GPU yet. On a CPU the same parts run on small shapes, for tests; what needs a GPU says so in a row.
"""
