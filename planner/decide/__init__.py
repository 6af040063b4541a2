"""What runs where: schedules, caches, policies, prefetch, capacity."""
