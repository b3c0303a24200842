"""Pictures of where a net sees the evidence for a class."""
