"""What later layers will choose, before their routers are asked."""
