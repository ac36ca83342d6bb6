"""Any backend behind the Tinker HTTP protocol of SDK 0.38.0 and an OpenAI-compatible one. Importing this loads no torch and no HTTP library.

with connect("local") as backend, serve(backend, ServeConfig(port=0)) as server:
    client = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
"""

from __future__ import annotations

from .keys import Key, Keys
from .running import Serving, keys_of, serve
from .settings import ServeConfig

__all__ = ["Key", "Keys", "ServeConfig", "Serving", "keys_of", "serve"]
