"""The example of Metronome's reference for `v1.usage.list_with_groups`, as it is printed there.

    pip install . metronome-sdk                     # in the repository
    metering serve --gateway 127.0.0.1:8080         # in another terminal: JSON is answered at the gateway
    python examples/clients/fixture.py              # makes the customer, the metric and their events
    python examples/clients/metronome_python/main.py

Two lines differ from the print: it calls METRONOME_BASE_URL (http://localhost:8080) and never Metronome itself, and it
takes an API key from METRONOME_BEARER_TOKEN, where the server has keys.
"""

import os
from datetime import datetime

from metronome import Metronome

client = Metronome(
    base_url=os.environ.get("METRONOME_BASE_URL", "http://localhost:8080"),
    bearer_token=os.environ.get("METRONOME_BEARER_TOKEN", "My Bearer Token"),
)
page = client.v1.usage.list_with_groups(
    billable_metric_id="222796fd-d29c-429e-89b2-549fabda4ed6",
    customer_id="04ca7e72-4229-4a6e-ab11-9f7376fccbcb",
    window_size="day",
    ending_before=datetime.fromisoformat("2021-01-03T00:00:00"),
    group_by={
        "key": "region",
        "values": ["US-East", "US-West", "EU-Central"],
    },
    starting_on=datetime.fromisoformat("2021-01-01T00:00:00"),
)
page = page.data[0]
print(page.ending_before)
