"""A page for people: `fewstep demo` mounts it on the application that `fewstep serve` makes.

`page.js` draws as one types, over the server's WebSocket; all else on the page is Gradio's (`page.py`), which calls
`scenes.py`; the pictures come from the served models (`drawing.py`) or, to compare engines, from `rivals.py`.
Only `command.py` is imported without the demo's libraries.
"""
