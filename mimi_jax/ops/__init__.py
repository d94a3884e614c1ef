"""What is computed in one of several ways, and who chooses."""
