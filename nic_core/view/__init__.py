"""``nic view``: a server of the slides and the products of a study, for a browser.

:mod:`nic_core.view.server` has the web application and needs the extra ``view`` (Starlette); the
other modules compute what it answers and need only the library.
"""
