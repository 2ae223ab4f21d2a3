"""Two reports of the bench against each other."""
