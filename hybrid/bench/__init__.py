"""What ``hybrid bench`` measures, and how."""
