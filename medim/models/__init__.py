"""Networks: encoders, decoders, critics, heads, and their files."""
