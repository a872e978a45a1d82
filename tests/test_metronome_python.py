"""Metronome's Python SDK, as it is, against metering behind Envoy."""

import asyncio

from metronome import Metronome


async def test_smoke(base_url: str) -> None:
    """The SDK creates a customer and reads it back."""

    def program() -> str:
        with Metronome(base_url=base_url, bearer_token="any") as sdk:
            made = sdk.v1.customers.create(name="Ada", ingest_aliases=["a"])
            return sdk.v1.customers.retrieve(customer_id=made.data.id).data.name

    assert await asyncio.to_thread(program) == "Ada"
