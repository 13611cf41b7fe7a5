"""The Python client of the gateway: `SomaAgent` and `AsyncSomaAgent`, with the errors they raise; needs httpx and pydantic alone"""
from .client import AsyncSomaAgent, SomaAgent
from .errors import *
