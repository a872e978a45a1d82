"""The RPCs: wire message to domain value, one store call in one transaction, and back."""
