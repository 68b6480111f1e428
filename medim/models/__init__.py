"""Networks: encoders, decoders, critics, heads, and the files they are kept in."""
