"""Answers the requests of OpenAI's clients: ``hybrid serve``."""
