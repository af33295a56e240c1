"""What trains on the way from a dense model to experts: carving them out of its FFN, and healing."""
