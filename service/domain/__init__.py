"""The rules of metering as pure values and functions: no I/O, no protobuf, no SQL."""
