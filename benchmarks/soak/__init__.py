"""Draw and train repeatedly in one process, and check that its resources do not grow.

`work` is one round, `sampling` measures the process after it, `loop` repeats both until the time is
over, `verdict` finds the curves that have grown, and `drawing` plots them.
"""
