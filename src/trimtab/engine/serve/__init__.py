"""Serving: many requests at once, each by its own adapter, with keys and values in pages.

ledger.py      which pages are whose, and what they hold
request.py     one completion that is asked for
adapters.py    what may be named: attached adapters, and registered ones
actors.py      who acts on a request, from when on and until when
line.py        those who wait, and who may go past whom
seats.py       whose values lie in slots, at which version
remembered.py  what gates remember, by request
pieces.py      what one forward is of
draw.py        the next token of each row
loop.py        the turns: who is let in, what is read, who gets a token
fits.py        whether a model's, and an adapter's, keys and values can lie in pages
"""

from trimtab.engine.serve.loop import Loop
from trimtab.engine.serve.request import Request

__all__ = ["Loop", "Request"]
