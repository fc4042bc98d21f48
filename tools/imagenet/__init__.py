"""Real networks and photographs from installed packages."""
