"""Node classes: schema, unpack, one call, return."""
