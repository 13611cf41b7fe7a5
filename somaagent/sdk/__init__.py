"""The Python client of the gateway: `SomaAgent` and `AsyncSomaAgent`; needs httpx and pydantic alone"""
from .client import AsyncSomaAgent, SomaAgent
__all__ = ["AsyncSomaAgent", "SomaAgent"]
