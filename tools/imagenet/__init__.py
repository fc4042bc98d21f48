"""Real networks and photographs that installed packages carry."""
