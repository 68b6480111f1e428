"""Network connections of a node: the receiver, the forwarder and queries."""
