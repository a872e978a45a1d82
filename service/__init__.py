"""Usage metering over gRPC."""
