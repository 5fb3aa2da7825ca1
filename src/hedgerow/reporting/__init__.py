"""What finished runs come to: tables."""
