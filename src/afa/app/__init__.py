"""The page of `afa app`: comparison of pictures, fusion weights, steering and history.

`drawing` draws in a thread that can be stopped, `views` renders pictures and texts, `layout`
defines the controls, `page` handles events and `server` serves the page.
"""
