"""One process that draws and trains over and over, and whether what it holds stays flat.

`work` is what it does, `sampling` what is looked at after each round, `loop` does the one and the
other until the time is over, `verdict` says which curves have grown, and `drawing` draws them.
"""
