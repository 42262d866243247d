"""The page of `afa app`: pictures side by side, who did what, steering, and what was drawn before.

`drawing` draws in a thread that can be stopped, `views` makes what is seen of a picture, `layout`
is what there is on the page and `page` what it does, `server` serves it.
"""
