"""Parts that every main script shares; one purpose a file."""
