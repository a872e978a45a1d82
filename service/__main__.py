"""Lets `python -m service` do what the `metering` command does."""

from service.cli import main

main()
