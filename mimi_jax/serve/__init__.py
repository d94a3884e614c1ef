"""Live streams over WebSockets, and a page on which to hear them.

`page/` has the page, which needs no build step. `docs/serving.md` documents what goes over the wire.

limits    how much a session may use, and who may open one
metrics   numbers for Prometheus
socket    a connection within its limits
moving    sessions on their way from one server to another
sessions  what a client sends, and what it gets
app       the server
"""
