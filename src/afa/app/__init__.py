"""The page of `afa app`: pictures side by side, who did what, steering, and what was drawn before.

`drawing` draws in a thread that can be stopped, `views` makes what is seen of a picture, `page` is
the layout and its events, `server` serves it.
"""
