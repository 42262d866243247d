"""The zoo built anew: sprites, base, experts, judges, an ensemble."""
