"""What an invocation costs here, measured beside two bare processes doing the same."""
